"""Every matrix product of a training step, forward and backward, from the model's sizes alone; torch-free.

The sizes of weights are those of `arithmetic.block_matrices`; the sum of all products is `arithmetic.model_flops`.
Tests hold it to that, to PyTorch's own counter, and to the products that the trainer is seen to make.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from tozan.models.arithmetic import Shape, block_matrices, parameters

Direction = Literal["forward", "input gradient", "weight gradient"]
Form = Literal["nt", "nn", "tn"]
"""How the operands lie in memory, the summed dim first or last: `nt` is a·bᵀ, `nn` a·b, `tn` aᵀ·b, all row by row."""

SPLIT_BY_COLUMNS = {"attn.qkv", "mlp.fc", "mlp.gate", "mlp.up", "head"}
"""Weights whose outputs a tensor-parallel rank holds a part of; of the others it holds a part of the inputs."""


@dataclass(frozen=True)
class Product:
    """A matrix product (batch × m × k) · (batch × k × n), so many times in a step.

    Attributes:
        name: what it belongs to: `attn.qkv`, `attn.scores` (Q·Kᵀ), `attn.values` (P·V), `mlp.fc`, `head`, ….
        direction: forward, or which gradient it makes. Of the two products in attention, the gradient of the left
            operand (Q, P) counts as the input's and that of the right one (K, V) as the weight's.
        form: how the operands lie, as the trainer calls it.
        m: rows of the result.
        n: its columns.
        k: summed dim.
        batch: matrices side by side; 1 for a plain product.
        count: times in a step.
    """

    name: str
    direction: Direction
    form: Form
    m: int
    n: int
    k: int
    batch: int = 1
    count: int = 1

    @property
    def flops(self) -> int:
        """Of one product; a multiply-add counts two."""
        return 2 * self.batch * self.m * self.n * self.k

    @property
    def step_flops(self) -> int:
        """Of all of them in a step."""
        return self.count * self.flops

    def bytes(self, element: int, result: int | None = None) -> int:
        """Least bytes moved by one product: both operands read once, the result written once.

        Args:
            element: bytes of an operand's element.
            result: bytes of a result's element; default: the same.
        """
        m, n, k = self.m, self.n, self.k
        return self.batch * (element * (m * k + k * n) + (result or element) * m * n)

    @property
    def label(self) -> str:
        """Its sizes: `12×256×1024×64` is batch × m × n × k; a plain product has no batch."""
        sizes = (self.m, self.n, self.k) if self.batch == 1 else (self.batch, self.m, self.n, self.k)
        return "×".join(map(str, sizes))


def products(
    shape: Shape,
    micro_batch: int = 1,
    micro_batches: int = 1,
    tensor: int = 1,
    *,
    query_blocks: Sequence[tuple[int, int]] | None = None,
    attention_samples: int | None = None,
    head_tokens: int | None = None,
) -> list[Product]:
    """The products that one rank computes in one step.

    Args:
        shape: the model.
        micro_batch: samples in one forward pass.
        micro_batches: forward passes in a step.
        tensor: ranks that share every matrix (1D, after Megatron). Where it does not divide the heads, the products are
            those of a rank that has most of them, since the others wait for it.
        query_blocks: queries and keys of each block of queries that attention goes through; None counts the whole
            T × T scores, as published figures do.
        attention_samples: samples that attention takes at a time; None: all of a micro-batch.
        head_tokens: tokens that the output head takes at a time; None: all at once.

    Raises:
        ValueError: `tensor` does not divide the width, the MLP or the vocabulary.
    """
    sides = {"width": shape.width, "mlp_width": shape.mlp_width, "vocabulary": shape.vocabulary}
    wrong = [f"{name} {size}" for name, size in sides.items() if size % tensor]
    if wrong:
        raise ValueError(f"tensor {tensor} does not divide {', '.join(wrong)}")
    tokens = micro_batch * shape.sequence
    found: list[Product] = []
    for name, (outputs, inputs) in block_matrices(shape).items():
        found += _linear(name, tokens, outputs, inputs, tensor, shape.layers * micro_batches)
        if name == "attn.qkv":
            together = attention_samples or micro_batch
            passes = shape.layers * micro_batches * micro_batch // together
            found += _attention(shape, together, passes, tensor, query_blocks)
    for rows, count in _chunks(tokens, head_tokens or tokens):
        found += _linear("head", rows, shape.vocabulary, shape.width, tensor, count * micro_batches)
    return found


def _linear(name: str, tokens: int, outputs: int, inputs: int, tensor: int, count: int) -> Iterator[Product]:
    if name in SPLIT_BY_COLUMNS:
        outputs //= tensor
    else:
        inputs //= tensor
    yield Product(name, "forward", "nt", tokens, outputs, inputs, count=count)
    yield Product(name, "input gradient", "nn", tokens, inputs, outputs, count=count)
    yield Product(name, "weight gradient", "tn", outputs, inputs, tokens, count=count)


def _attention(
    shape: Shape, samples: int, count: int, tensor: int, blocks: Sequence[tuple[int, int]] | None
) -> Iterator[Product]:
    """Heads that share their keys are one taller matrix: batch is the key heads, m their queries."""
    size, group = shape.head_size, shape.heads // shape.kv_heads
    batch = samples * -(-shape.kv_heads // tensor)
    for queries, keys in blocks or [(shape.sequence, shape.sequence)]:
        rows = group * queries
        scores = Product("attn.scores", "forward", "nt", rows, keys, size, batch, count)
        values = Product("attn.values", "forward", "nn", rows, size, keys, batch, count)
        yield from (scores, values)
        yield replace(values, direction="input gradient", form="nt", n=keys, k=size)
        yield replace(values, direction="weight gradient", form="tn", m=keys, k=rows)
        yield replace(scores, direction="input gradient", form="nn", n=size, k=keys)
        yield replace(scores, direction="weight gradient", form="tn", m=keys, n=size, k=rows)


def _chunks(tokens: int, most: int) -> Iterator[tuple[int, int]]:
    """(rows, how many chunks of them)."""
    whole, rest = divmod(tokens, most)
    if whole:
        yield most, whole
    if rest:
        yield rest, 1


def other_flops(shape: Shape, micro_batch: int = 1, micro_batches: int = 1) -> int:
    """FLOPs of a step beside its matrix products, roughly: what makes "99% is GEMM" a number.

    Elementary operations are counted one each (exp, tanh and division too). Per element, forward and backward
    together: norms 20, softmax over the causal half 10, GELU or SwiGLU 30, biases 2, residual additions 4, rotary
    positions 12, the loss 8 per logit, AdamW with clipping 18 per parameter and step.
    """
    tokens = micro_batch * micro_batches * shape.sequence
    matrices = block_matrices(shape)
    biases = 2 * sum(rows for rows, _ in matrices.values()) if shape.family == "gpt2" else 0
    rotary = 12 * (shape.width + shape.kv_width) if shape.family == "llama" else 0
    softmax = 10 * shape.heads * (shape.sequence + 1) // 2
    block = 2 * 20 * shape.width + softmax + 30 * shape.mlp_width + biases + rotary + 4 * shape.width
    token = shape.layers * block + 20 * shape.width + 8 * shape.vocabulary
    return tokens * token + 18 * parameters(shape)
