"""Parameters and FLOPs of a transformer from its sizes alone; torch-free, so that a login node can price a run.

Every count is exact for the models beside this file, and tests hold it to them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

Family = Literal["gpt2", "llama"]


@dataclass(frozen=True)
class Shape:
    """All sizes of a model, none left to default.

    Attributes:
        family: `gpt2` (LayerNorm, learned positions, GELU, biases) or `llama` (RMSNorm, RoPE, SwiGLU, no biases).
        layers: transformer blocks (L).
        width: residual stream (D).
        heads: query heads (H); head size is D / H.
        kv_heads: key/value heads.
        mlp_width: inner width of the MLP (F).
        vocabulary: rows of the embedding (V).
        sequence: tokens per sample (T); for gpt2 also the number of learned positions.
        tied: the output head shares the embedding.
        norm_eps: added to the variance in norms.
        rope_base: base of the rotary frequencies (llama).
        dropout: probability of dropping a residual branch's element.
    """

    family: Family
    layers: int
    width: int
    heads: int
    kv_heads: int
    mlp_width: int
    vocabulary: int
    sequence: int
    tied: bool = True
    norm_eps: float = 1e-5
    rope_base: float = 10_000.0
    dropout: float = 0.0

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.width // self.heads

    @property
    def kv_width(self) -> int:
        """Width of all keys (or values) of one token."""
        return self.kv_heads * self.head_size


def default_mlp_width(family: Family, width: int) -> int:
    """4 × width for gpt2; 8/3 × width rounded up to a multiple of 64 for llama."""
    return 4 * width if family == "gpt2" else -(-8 * width // (3 * 64)) * 64


def block_matrices(shape: Shape) -> dict[str, tuple[int, int]]:
    """The weight matrices of one block as `{name: (outputs, inputs)}`."""
    d, f, kv = shape.width, shape.mlp_width, shape.kv_width
    matrices = {"attn.qkv": (d + 2 * kv, d), "attn.proj": (d, d)}
    if shape.family == "gpt2":
        return matrices | {"mlp.fc": (f, d), "mlp.proj": (d, f)}
    return matrices | {"mlp.gate": (f, d), "mlp.up": (f, d), "mlp.down": (d, f)}


def parameter_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Name and size of every parameter of the whole model, in the order of the model's `named_parameters`."""
    width, biased = shape.width, shape.family == "gpt2"
    found: dict[str, tuple[int, ...]] = {"embed.weight": (shape.vocabulary, width)}
    if biased:
        found["position.weight"] = (shape.sequence, width)

    def norm(name: str) -> None:
        found[f"{name}.weight"] = (width,)
        if biased:
            found[f"{name}.bias"] = (width,)

    matrices = block_matrices(shape)
    for block in range(shape.layers):
        for number, part in enumerate(("attn", "mlp"), 1):
            norm(f"blocks.{block}.norm{number}")
            for name, size in matrices.items():
                if name.startswith(part):
                    found[f"blocks.{block}.{name}.weight"] = size
                    if biased:
                        found[f"blocks.{block}.{name}.bias"] = size[:1]
    norm("norm")
    if not shape.tied:
        found["head.weight"] = (shape.vocabulary, width)
    return found


def block_parameters(shape: Shape) -> int:
    """Parameters of one block: matrices, their biases (gpt2) and two norms."""
    matrices = block_matrices(shape).values()
    weights = sum(rows * columns for rows, columns in matrices)
    if shape.family == "gpt2":
        return weights + sum(rows for rows, _ in matrices) + 4 * shape.width
    return weights + 2 * shape.width


def parameters(shape: Shape) -> int:
    """Parameters of the whole model; a tied head is counted once."""
    embedding = shape.vocabulary * shape.width
    positions = shape.sequence * shape.width if shape.family == "gpt2" else 0
    final_norm = (2 if shape.family == "gpt2" else 1) * shape.width
    head = 0 if shape.tied else embedding
    return embedding + positions + shape.layers * block_parameters(shape) + final_norm + head


def forward_flops(shape: Shape, sequence: int | None = None) -> int:
    """Matrix-product FLOPs of one sample's forward pass (a multiply-add counts two).

    2·T·Σ(weights of all products, the output head included) + 4·L·T²·D for QKᵀ and AV, counted in full
    though the causal half is masked: the convention of PaLM (arXiv 2204.02311, appendix B) and of
    Megatron (arXiv 2104.04473, equation 3), so that figures compare.
    """
    tokens = sequence or shape.sequence
    products = shape.layers * sum(rows * columns for rows, columns in block_matrices(shape).values())
    products += shape.vocabulary * shape.width
    return 2 * tokens * products + 4 * shape.layers * tokens * tokens * shape.width


def model_flops(shape: Shape) -> int:
    """FLOPs that training one sample needs: forward, and twice that for backward. The numerator of MFU."""
    return 3 * forward_flops(shape)


def hardware_flops(shape: Shape, recompute: Literal["none", "selective", "full"]) -> int:
    """FLOPs that training one sample executes, recomputation included. The numerator of HFU.

    `selective` recomputes no matrix product (only element-wise work), so it equals `none`. `full` is counted as every
    block's forward once more, the convention of published figures; each block's last product is in fact not repeated.
    """
    head = 2 * shape.sequence * shape.vocabulary * shape.width
    again = forward_flops(shape) - head if recompute == "full" else 0
    return model_flops(shape) + again


class ModelTable(Protocol):
    """What `resolve` reads: the `[model]` table of a config (`tozan.config.schema.Model`)."""

    family: Family
    layers: int
    width: int
    heads: int
    kv_heads: int | None
    mlp_width: int | None
    vocabulary: int | None
    sequence: int
    tied: bool
    norm_eps: float
    rope_base: float
    dropout: float


def resolve(table: ModelTable, tokenizer_size: int | None = None) -> Shape:
    """The full shape of a config's model table.

    Args:
        table: the `[model]` table; sizes left out take their defaults.
        tokenizer_size: ids of the tokenizer; the default vocabulary is this, rounded up to a multiple of 64
            (matrix units like round sizes).

    Raises:
        ValueError: neither the table nor a tokenizer says how large the vocabulary is.
    """
    vocabulary = table.vocabulary
    if vocabulary is None:
        if tokenizer_size is None:
            raise ValueError("the vocabulary needs model.vocabulary or a tokenizer")
        vocabulary = -(-tokenizer_size // 64) * 64
    return Shape(
        family=table.family,
        layers=table.layers,
        width=table.width,
        heads=table.heads,
        kv_heads=table.kv_heads or table.heads,
        mlp_width=table.mlp_width or default_mlp_width(table.family, table.width),
        vocabulary=vocabulary,
        sequence=table.sequence,
        tied=table.tied,
        norm_eps=table.norm_eps,
        rope_base=table.rope_base,
        dropout=table.dropout,
    )
