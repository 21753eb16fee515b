"""Matrix products on a q×q grid of ranks (SUMMA, van de Geijn and Watts 1997; for transformers arXiv 2104.05343).

Rank (i, j) holds block (i, j) of every matrix. A·B is q steps: in step l the ranks of each row receive A[i, l] from the
one that has it, those of each column B[l, j], and add the product. Of A·Bᵀ and Aᵀ·B one operand is received and the
products are summed onto the rank where they belong. Each of the three forms has the other two as its gradients:

    C = A·B     dA = dC·Bᵀ    dB = Aᵀ·dC
    C = A·Bᵀ    dA = dC·B     dB = dCᵀ·A
    C = Aᵀ·B    dA = B·dCᵀ    dB = A·dC

In 2.5D (Tesseract, arXiv 2105.14500) each of d grids multiplies its own rows of A by the same B. The gradient of B is
then a part; the sum over depth is left to the caller, who needs it once per step and not in every product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tozan.comm import Axis, Handle, collectives


@dataclass(frozen=True)
class Grid:
    """The q×q ranks that share a product.

    Attributes:
        row: this rank's row number is `row.index`; a collective over it is among the ranks of one column.
        column: this rank's column number is `column.index`; a collective over it is among the ranks of one row.
    """

    row: Axis
    column: Axis

    def __post_init__(self) -> None:
        if self.row.size != self.column.size:
            raise ValueError(f"a SUMMA grid is square; this one is {self.row.size} × {self.column.size}")

    @property
    def side(self) -> int:
        """Ranks in a row or column (q)."""
        return self.row.size


def summa(a: Tensor, b: Tensor, grid: Grid) -> Tensor:
    """C = A·B.

    Args:
        a: block (i, j) of A, (M/q, K/q).
        b: block (i, j) of B, (K/q, N/q), of the same dtype.
        grid: the ranks; all of them must call.

    Returns:
        Block (i, j) of C, (M/q, N/q). Partial sums are kept in fp32 at least.

    Raises:
        ValueError: blocks that do not fit.
    """
    return _multiply("nn", a, b, grid)


def summa_nt(a: Tensor, b: Tensor, grid: Grid) -> Tensor:
    """C = A·Bᵀ: from blocks (M/q, K/q) and (N/q, K/q) to (M/q, N/q); otherwise as `summa`."""
    return _multiply("nt", a, b, grid)


def summa_tn(a: Tensor, b: Tensor, grid: Grid) -> Tensor:
    """C = Aᵀ·B: from blocks (K/q, M/q) and (K/q, N/q) to (M/q, N/q); otherwise as `summa`."""
    return _multiply("tn", a, b, grid)


def _multiply(form: str, a: Tensor, b: Tensor, grid: Grid) -> Tensor:
    inner = a.shape[0 if form == "tn" else 1], b.shape[1 if form == "nt" else 0]
    if a.dtype != b.dtype or inner[0] != inner[1]:
        operands = " and ".join(f"{tuple(x.shape)} {x.dtype}" for x in (a, b))
        raise ValueError(f"SUMMA product {form!r} of blocks {operands}")
    return _Summa.apply(a, b, grid, form)  # type: ignore[no-any-return, no-untyped-call]


class _Summa(torch.autograd.Function):
    """A product with its two adjoint products."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, grid: Grid, form: str) -> Tensor:
        """The product of one form."""
        ctx.save_for_backward(a, b)
        ctx.grid, ctx.form = grid, form
        return PRODUCTS[form](a, b, grid)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, Tensor | None, None, None]:
        """The products of the other two forms. Both operands' gradients are made on all ranks or on none."""
        a, b = ctx.saved_tensors
        dc, grid = gradients[0], ctx.grid
        for_a: dict[str, Callable[[], Tensor]] = {
            "nn": lambda: product_nt(dc, b, grid),
            "nt": lambda: product_nn(dc, b, grid),
            "tn": lambda: product_nt(b, dc, grid),
        }
        for_b: dict[str, Callable[[], Tensor]] = {
            "nn": lambda: product_tn(a, dc, grid),
            "nt": lambda: product_tn(dc, a, grid),
            "tn": lambda: product_nn(a, dc, grid),
        }
        da = for_a[ctx.form]() if ctx.needs_input_grad[0] else None
        db = for_b[ctx.form]() if ctx.needs_input_grad[1] else None
        return da, db, None, None


def product_nn(a: Tensor, b: Tensor, grid: Grid) -> Tensor:
    """A·B without gradients: C[i, j] = Σₗ A[i, l]·B[l, j]."""
    panels = zip(_panels(a, grid.column), _panels(b, grid.row), strict=True)
    return _total((a_l @ b_l for a_l, b_l in panels), a.dtype)


def product_nt(a: Tensor, b: Tensor, grid: Grid) -> Tensor:
    """A·Bᵀ without gradients: C[i, l] = Σⱼ A[i, j]·B[l, j]ᵀ, summed along the row onto column l."""
    return _owned((a @ b_l.T for b_l in _panels(b, grid.row)), grid.column)


def product_tn(a: Tensor, b: Tensor, grid: Grid) -> Tensor:
    """Aᵀ·B without gradients: C[l, j] = Σᵢ A[i, l]ᵀ·B[i, j], summed along the column onto row l."""
    return _owned((a_l.T @ b for a_l in _panels(a, grid.column)), grid.row)


PRODUCTS = {"nn": product_nn, "nt": product_nt, "tn": product_tn}


def _panels(block: Tensor, axis: Axis) -> Iterator[Tensor]:
    """The blocks of all ranks along `axis` in turn; the next one is on its way while one is being used."""
    block = block.contiguous()

    def start(source: int) -> tuple[Tensor, Handle]:
        panel = block if source == axis.index else torch.empty_like(block)
        return panel, collectives.broadcast_async(panel, axis, source, name="summa panel")

    coming = start(0)
    for source in range(axis.size):
        panel, handle = coming
        if source + 1 < axis.size:
            coming = start(source + 1)
        handle.wait()
        yield panel


def _total(parts: Iterator[Tensor], dtype: torch.dtype) -> Tensor:
    """The sum of products, added up in fp32 at least."""
    first = next(parts)
    total = first if first.dtype in (torch.float32, torch.float64) else first.float()
    for part in parts:
        total += part
    return total.to(dtype)


def _owned(parts: Iterator[Tensor], axis: Axis) -> Tensor:
    """Part number l summed over `axis` onto rank l; this rank's sum. Each is on its way while the next is made."""
    if axis.size == 1:
        return next(parts)
    going: list[Handle] = []
    for owner, part in enumerate(parts):
        sizes = [part.numel() if index == owner else 0 for index in range(axis.size)]
        going.append(collectives.scatter_sum_async(part.contiguous().view(-1), axis, sizes, name="summa sum"))
        if owner:
            going[owner - 1].wait()
        shape = part.shape
    going[-1].wait()
    return going[axis.index].wait().view(shape)
