"""Bytes that tensor parallelism sends, from sizes alone; torch-free. The ledger counts the same.

All are bytes sent, averaged over the ranks, in the ledger's terms: an all-reduce of B bytes over n ranks sends
2·B·(n−1)/n per rank, an all-gather or reduce-scatter half of that, a broadcast B·(n−1) in all.

1D (Megatron, arXiv 1909.08053; with sequence parallelism arXiv 2205.05198) makes one all-reduce of B·T·D elements for
each pair of products, or an all-gather and a reduce-scatter: 4·(n−1)/n·B·T·D per layer forward, and as many backward.

2D (Optimus, arXiv 2104.05343): a product of (M × K) by (K × N) on a q×q grid sends (q−1)/q²·(M·K + K·N) per rank
forward and twice that backward: panels of one operand and sums of the other, for each gradient. With M = B·T and GPT's
four products that is (q−1)/q²·(7·B·T·D + 12·D²) forward. The paper's log(p)/(2√p)·(7bsh + 12h²) is the time of the
same panels if each of q trips goes down a tree of log₂ q steps. Norms add two numbers per token and norm (one for
RMSNorm).

2.5D (Tesseract, arXiv 2105.14500): 2D with M = B·T/d on each of d grids, and once per step the sum of all gradients
over depth.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from tozan.layout import Layout, Scheme
from tozan.models.arithmetic import Shape, block_matrices, block_parameters

STATISTICS_BYTES = 4
"""Norm statistics and gradients travel in fp32."""


@dataclass(frozen=True)
class Volume:
    """Bytes that a rank sends for one transformer block, on average over the ranks.

    Attributes:
        forward: in one micro-batch's forward pass.
        backward: in its backward pass, without recomputation.
        step: once per optimizer step, for gradients of which ranks have parts.
    """

    forward: Fraction
    backward: Fraction
    step: Fraction


def block_volume(
    shape: Shape, layout: Layout, micro_batch: int, *, sequence_parallel: bool = False, element_bytes: int = 4
) -> Volume:
    """What one block sends over the tensor-parallel axes.

    Args:
        shape: the model's sizes.
        layout: the mesh; only its tensor-parallel axes count.
        micro_batch: samples of one forward pass of the whole tensor-parallel group.
        sequence_parallel: of the 1D scheme.
        element_bytes: of the type that products run in: 2 for bf16.
    """
    if layout.scheme == "1d":
        return _line(shape, layout.tp, micro_batch * shape.sequence, sequence_parallel, element_bytes)
    return _grid(shape, layout, micro_batch * shape.sequence, element_bytes)


def _line(shape: Shape, ranks: int, tokens: int, sequence_parallel: bool, element_bytes: int) -> Volume:
    """1D: two pairs of products."""
    share = Fraction(ranks - 1, ranks)
    passes = 2 * 2 * share * tokens * shape.width * element_bytes
    # Norms, and row-parallel biases (one per pair): whole on every rank, which sees a part of the tokens.
    split = _norm_parameters(shape) + (2 * shape.width if shape.family == "gpt2" else 0)
    return Volume(passes, passes, 2 * share * split * STATISTICS_BYTES if sequence_parallel else Fraction(0))


def _grid(shape: Shape, layout: Layout, tokens: int, element_bytes: int) -> Volume:
    """2D and 2.5D: SUMMA's panels and sums, the norms' statistics, and the sums of gradients over depth and rows."""
    side, depth = layout.grid, layout.tp_depth
    rows = Fraction(tokens, depth)
    matrices = block_matrices(shape).values()
    moved = sum(rows * inputs + inputs * outputs for outputs, inputs in matrices)
    products = Fraction(side - 1, side * side) * moved * element_bytes
    # Two norms, their statistics for this rank's tokens.
    numbers = 2 * (2 if shape.family == "gpt2" else 1) * rows / side * STATISTICS_BYTES
    vectors = _norm_parameters(shape)
    if shape.family == "gpt2":
        vectors += sum(outputs for outputs, _ in matrices)
    over_depth = Fraction(block_parameters(shape) - vectors, side * side) + Fraction(vectors, side)
    step = 2 * Fraction(depth - 1, depth) * over_depth + 2 * Fraction(side - 1, side) * Fraction(vectors, side)
    return Volume(
        products + (side - 1) * numbers,
        2 * products + 2 * Fraction(side - 1, side) * numbers,
        step * STATISTICS_BYTES,
    )


def _norm_parameters(shape: Shape) -> int:
    """Parameters of a block's two norms."""
    return (4 if shape.family == "gpt2" else 2) * shape.width


EXAMPLE = Shape("gpt2", layers=24, width=2048, heads=32, kv_heads=32, mlp_width=8192, vocabulary=51200, sequence=1024)
"""GPT of 1.3 B parameters, for the table in the manual."""

GRIDS: tuple[tuple[int, Scheme, int], ...] = (
    *((tp, "1d", 1) for tp in (4, 8, 16, 32, 64)),
    *((tp, "2d", 1) for tp in (4, 16, 64)),
    *((tp, "2.5d", depth) for tp, depth in ((8, 2), (16, 4), (32, 2), (32, 8), (64, 4))),
)
"""Ranks, scheme and depth of the table's rows."""


def table(micro_batch: int = 64) -> str:
    """The manual's table, in Markdown: MB that a rank sends for one block of `EXAMPLE` in bf16."""
    lines = [
        "| ranks | scheme | forward | backward | both, per micro-batch | gradient sums, per step |",
        "|---:|---|---:|---:|---:|---:|",
    ]
    for tp, scheme, depth in sorted(GRIDS):
        layout = Layout(tp=tp, scheme=scheme, tp_depth=depth)
        name = {"1d": "1D", "2d": f"2D, {layout.grid} × {layout.grid}"}.get(
            scheme, f"2.5D, {layout.grid} × {layout.grid} × {depth}"
        )
        found = block_volume(EXAMPLE, layout, micro_batch, element_bytes=2)
        numbers = (found.forward, found.backward, found.forward + found.backward, found.step)
        lines.append(f"| {tp} | {name} | " + " | ".join(f"{float(number) / 1e6:,.1f}" for number in numbers) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
