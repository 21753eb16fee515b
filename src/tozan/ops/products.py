"""Matrix products and linear layers, by a kernel of tozan's own where that is faster than PyTorch's libraries.

The kernels (`gemm.cpp` on AVX-512, `gemm_tiles.cpp` on AMX) take operands of any layout and type as they are: fp32
weights go into a bf16 product without a copy, and a result is written in the type that whoever comes next wants, or
added to what is there. So nothing is transposed or cast on the way. Where no kernel pays (see `pays`), PyTorch does the
same work.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tozan.ops import native, tiles

LEAST_ROWS = 24
"""Rows of a result from which the kernel is used: below, packing the other operand costs more than the product."""

_LETTERS = {torch.float32: "f", torch.bfloat16: "b"}


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type that a matrix product of `x` runs in: autocast's if it is on (it leaves fp64 alone), else its own."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def usable(dtype: torch.dtype, rows: int, *tensors: Tensor | None) -> bool:
    """Whether a kernel takes a product that runs in `dtype` and has so many rows, and pays."""
    return rows >= LEAST_ROWS and dtype in _LETTERS and native.usable(*tensors) and pays(dtype)


def pays(dtype: torch.dtype) -> bool:
    """Whether products that run in `dtype` have a kernel on this processor that is faster than PyTorch's libraries.

    On AVX-512 that was measured on AMD's Zen 4, where PyTorch's libraries, which are Intel's, leave a part of the rate;
    on AMX tiles, which take bf16 only, it is measured where they are.
    """
    return (dtype == torch.bfloat16 and tiles.library("products") is not None) or native.products_pay()


def status(dtype: torch.dtype | None) -> str:
    """Who makes a linear layer's products in `dtype` on this processor, and why; None: they are made elsewhere."""
    return tiles.status("products", dtype, native.products_pay, "PyTorch's libraries")


def product_reference(
    a: Tensor, b: Tensor, dtype: torch.dtype, result: torch.dtype | None = None, bias: Tensor | None = None
) -> Tensor:
    """What `product` computes, in plain PyTorch."""
    a, b = a.to(dtype), b.to(dtype)
    if a.is_cuda and result == torch.float32 != dtype and bias is None:
        return torch.mm(a, b, out_dtype=result)  # as the GPU has added it up, not rounded on the way
    y = torch.mm(a, b) if bias is None else torch.addmm(bias.to(dtype), a, b)
    return y.to(result or dtype)


def product(
    a: Tensor,
    b: Tensor,
    dtype: torch.dtype,
    result: torch.dtype | None = None,
    *,
    bias: Tensor | None = None,
    into: Tensor | None = None,
    rows: int | None = None,
) -> Tensor:
    """A · B (+ bias), without gradients, added up in fp32 at least.

    Args:
        a: (m, k).
        b: (k, n).
        dtype: what the operands are rounded to.
        result: type of the result; default: `dtype`.
        bias: (n,), added to every row.
        into: (m, n), contiguous fp32 (fp64 if `dtype` is): the product is added to it.
        rows: what decides whether the kernel is used (see `usable`); default: m.

    Returns:
        (m, n); `into`, if it was given.
    """
    if not usable(dtype, a.shape[0] if rows is None else rows, a, b, bias, into) or b.numel() == 0:
        if into is not None and into.is_cuda and into.dtype != dtype:
            return torch.addmm(into, a.to(dtype), b.to(dtype), out_dtype=into.dtype, out=into)
        y = product_reference(a, b, dtype, result, bias)
        return y if into is None else into.add_(y)
    a = _operand(a if dtype == torch.float32 or a.dtype == dtype else a.to(dtype))
    b = _operand(b.float() if dtype == torch.float32 else b)
    y = a.new_empty(a.shape[0], b.shape[1], dtype=result or dtype) if into is None else into
    variant = _LETTERS[a.dtype] + _LETTERS[b.dtype] + _LETTERS[y.dtype]
    if variant not in native.PRODUCTS:  # fp32 operands with a bf16 result
        return product_reference(a, b, dtype, result, bias)
    full_bias = None if bias is None else bias.float().contiguous()
    library = tiles.library("products") if dtype == torch.bfloat16 else None
    native.product(variant, a, b, y, full_bias, add=into is not None, library=library)
    return y


def _operand(x: Tensor) -> Tensor:
    """The same matrix with neighbours in memory along one dim."""
    return x if 1 in x.stride() else x.contiguous()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`: x·Wᵀ + b for x (…, in), weight (out, in) and bias (out,), in autocast's type if that is on.

    With the kernel, gradients of fp32 tensors are made in fp32 at once; x is kept in the compute type.
    """
    dtype = compute_dtype(x)
    rows = x.numel() // max(1, x.shape[-1])
    fits = weight.dtype in (x.dtype, torch.float32) and usable(dtype, rows, x, weight, bias)
    if not fits or (weight.dtype != x.dtype and dtype == torch.float32):
        return F.linear(x, weight, bias)
    entered = _Entrance.apply(x, weight, dtype)  # type: ignore[no-untyped-call]
    if entered.grad_fn is None:
        return forward(x.to(dtype), weight, bias, dtype)
    return _Linear.apply(entered, weight, bias, dtype)  # type: ignore[no-any-return, no-untyped-call]


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x·Wᵀ + b of a linear layer, (…, out) in `dtype`."""
    y = product(x.flatten(0, -2), weight.T, dtype, bias=bias)
    return y.view(*x.shape[:-1], weight.shape[0])


def input_gradient(dy: Tensor, weight: Tensor, dtype: torch.dtype, result: torch.dtype) -> Tensor:
    """dy·W for dy (…, out): (…, in) of type `result`."""
    dx = product(dy.flatten(0, -2), weight, dtype, result)
    return dx.view(*dy.shape[:-1], weight.shape[1])


def weight_gradient(dy: Tensor, x: Tensor, dtype: torch.dtype, result: torch.dtype) -> Tensor:
    """dyᵀ·x for dy (…, out) and x (…, in): (out, in) of type `result`."""
    dy, x = dy.flatten(0, -2), x.flatten(0, -2)
    return product(dy.T, x, dtype, result, rows=len(x))


def bias_gradient(dy: Tensor, result: torch.dtype) -> Tensor:
    """The sum of dy (…, out) over everything but the last dim, (out,)."""
    dy = dy.flatten(0, -2)
    if not usable(dy.dtype, len(dy), dy):
        return dy.sum(0).to(result)
    sums = dy.new_empty(dy.shape[1], dtype=torch.float32)
    native.call("column_sums", dy.dtype, dy.contiguous(), *dy.shape, sums)
    return sums.to(result)


class _Entrance(torch.autograd.Function):
    """Keeps for `_Linear` what its backward pass needs.

    Apart from it, because recomputation stops once everything has been kept again, and the product need not be made.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.ready = x.to(dtype)
        ctx.save_for_backward(ctx.ready, weight)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None, None]:  # noqa: ARG004
        return dx, None, None


class _Linear(torch.autograd.Function):
    """y = x·Wᵀ + b for an x that has come through `_Entrance`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        ctx.entrance, ctx.dtype, ctx.x_dtype = x.grad_fn, dtype, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return forward(ctx.entrance.__dict__.pop("ready"), weight, bias, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.entrance.saved_tensors
        dx = input_gradient(dy, weight, ctx.dtype, ctx.x_dtype) if ctx.entrance.needs_input_grad[0] else None
        dw = weight_gradient(dy, x, ctx.dtype, weight.dtype) if ctx.needs_input_grad[1] else None
        db = bias_gradient(dy, ctx.bias_dtype) if ctx.needs_input_grad[2] else None
        return dx, dw, db, None
