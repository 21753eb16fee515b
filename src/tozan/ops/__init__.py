"""Operations worth fusing on a CPU, each beside the plain reference that tests hold it to."""

from tozan.ops.activations import gelu, gelu_reference, swiglu, swiglu_reference
from tozan.ops.attention import causal_attention, causal_attention_reference, split_heads
from tozan.ops.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from tozan.ops.norms import layer_norm, layer_norm_reference, rms_norm, rms_norm_reference
from tozan.ops.products import linear, product, product_reference
from tozan.ops.rotary import rotate, rotate_reference
from tozan.ops.update import adamw, adamw_reference, checksum_reference, checksums

__all__ = [
    "adamw",
    "adamw_reference",
    "causal_attention",
    "causal_attention_reference",
    "checksum_reference",
    "checksums",
    "gelu",
    "gelu_reference",
    "layer_norm",
    "layer_norm_reference",
    "linear",
    "linear_cross_entropy",
    "linear_cross_entropy_reference",
    "product",
    "product_reference",
    "rms_norm",
    "rms_norm_reference",
    "rotate",
    "rotate_reference",
    "split_heads",
    "swiglu",
    "swiglu_reference",
]
