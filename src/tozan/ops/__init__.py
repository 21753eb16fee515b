"""Operations worth fusing on a CPU, each beside the plain reference that tests hold it to."""

from tozan.ops.activations import gelu, gelu_reference, swiglu, swiglu_reference
from tozan.ops.attention import causal_attention, causal_attention_reference, split_heads
from tozan.ops.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from tozan.ops.products import linear, product, product_reference

__all__ = [
    "causal_attention",
    "causal_attention_reference",
    "gelu",
    "gelu_reference",
    "linear",
    "linear_cross_entropy",
    "linear_cross_entropy_reference",
    "product",
    "product_reference",
    "split_heads",
    "swiglu",
    "swiglu_reference",
]
