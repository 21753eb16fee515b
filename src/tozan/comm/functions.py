"""Collectives that autograd can go through: each states its forward and its backward, which is the adjoint.

Losses are summed, and each rank's backward starts from its own share: a tensor that is the same on all ranks
("replicated") has gradient parts that add up, except where a function says its gradient is already replicated.

| function | forward | backward | used where |
|---|---|---|---|
| `copy_to` | identity | all_reduce | a replicated tensor enters sharded computation (Megatron's *f*) |
| `reduce_from` | all_reduce | identity | partial sums leave it (Megatron's *g*) |
| `gather_from` | all_gather | own part | a sharded tensor becomes replicated, and is used replicated |
| `scatter_to` | own part | all_gather | the reverse |
| `all_gather_from` | all_gather | reduce_scatter | a sharded tensor is gathered for sharded computation |
| `reduce_scatter_to` | reduce_scatter | all_gather | partial sums are scattered |
| `broadcast_from` | broadcast | reduce to the source | one rank's tensor is used by all (SUMMA) |
| `reduce_to` | reduce to the target | broadcast | partial sums are collected by one rank (SUMMA) |
| `all_to_all_over` | all_to_all | all_to_all back | heads against sequence (Ulysses) |

Copy and reduce follow Megatron-LM (arXiv 1909.08053), the sequence pair arXiv 2205.05198.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tozan.comm import collectives as c
from tozan.comm.mesh import Axis
from tozan.layout import split


def _own(x: Tensor, axis: Axis, dim: int) -> Tensor:
    part = split(x.shape[dim], axis.size, axis.index)
    return x.narrow(dim, part.start, len(part)).contiguous()


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, name: str) -> Tensor:
        ctx.axis, ctx.name = axis, name
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return c.all_reduce(_fresh(gradients[0]), ctx.axis, name=ctx.name), None, None


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, x: Tensor, axis: Axis, name: str) -> Tensor:
        return c.all_reduce(_fresh(x), axis, name=name)

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> Any:
        return gradients[0], None, None


class _GatherFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int, length: int | None, name: str) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return c.all_gather(x, axis, dim, length=length, name=name)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return _own(gradients[0], ctx.axis, ctx.dim), None, None, None, None


class _ScatterTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int, name: str) -> Tensor:
        ctx.axis, ctx.dim, ctx.name, ctx.length = axis, dim, name, x.shape[dim]
        return _own(x, axis, dim)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return c.all_gather(gradients[0], ctx.axis, ctx.dim, length=ctx.length, name=ctx.name), None, None, None


class _AllGatherFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int, length: int | None, name: str) -> Tensor:
        ctx.axis, ctx.dim, ctx.name = axis, dim, name
        return c.all_gather(x, axis, dim, length=length, name=name)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return c.reduce_scatter(gradients[0], ctx.axis, ctx.dim, name=ctx.name), None, None, None, None


class _ReduceScatterTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int, name: str) -> Tensor:
        ctx.axis, ctx.dim, ctx.name, ctx.length = axis, dim, name, x.shape[dim]
        return c.reduce_scatter(x, axis, dim, name=name)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return c.all_gather(gradients[0], ctx.axis, ctx.dim, length=ctx.length, name=ctx.name), None, None, None


class _BroadcastFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, source: int, name: str) -> Tensor:
        ctx.axis, ctx.source, ctx.name = axis, source, name
        return c.broadcast(_fresh(x), axis, source, name=name)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return c.reduce(gradients[0], ctx.axis, ctx.source, name=ctx.name), None, None, None


class _ReduceTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, target: int, name: str) -> Tensor:
        ctx.axis, ctx.target, ctx.name = axis, target, name
        return c.reduce(x, axis, target, name=name)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return c.broadcast(_fresh(gradients[0]), ctx.axis, ctx.target, name=ctx.name), None, None, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, split_dim: int, join_dim: int, name: str) -> Tensor:
        ctx.arguments = axis, join_dim, split_dim
        ctx.name = name
        return c.all_to_all(x, axis, split_dim, join_dim, name=name)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return c.all_to_all(gradients[0], *ctx.arguments, name=ctx.name), None, None, None, None


def _fresh(x: Tensor) -> Tensor:
    """A contiguous copy that a collective may write into: neither an input nor a gradient is ours to change."""
    return x.clone(memory_format=torch.contiguous_format)


def _apply(function: Any, x: Tensor, axis: Axis, *arguments: Any) -> Tensor:
    if axis.size == 1:
        return x
    result: Tensor = function.apply(x, axis, *arguments)
    return result


def copy_to(x: Tensor, axis: Axis, *, name: str = "") -> Tensor:
    """Forward: identity. Backward: all_reduce of the gradient."""
    return _apply(_CopyTo, x, axis, name)


def reduce_from(x: Tensor, axis: Axis, *, name: str = "") -> Tensor:
    """Forward: all_reduce. Backward: identity (the gradient of the sum is replicated)."""
    return _apply(_ReduceFrom, x, axis, name)


def gather_from(x: Tensor, axis: Axis, dim: int, *, length: int | None = None, name: str = "") -> Tensor:
    """Forward: all_gather along `dim` (to `length` if uneven). Backward: own part of the replicated gradient."""
    return _apply(_GatherFrom, x, axis, dim, length, name)


def scatter_to(x: Tensor, axis: Axis, dim: int, *, name: str = "") -> Tensor:
    """Forward: this rank's part along `dim`. Backward: all_gather."""
    return _apply(_ScatterTo, x, axis, dim, name)


def all_gather_from(x: Tensor, axis: Axis, dim: int, *, length: int | None = None, name: str = "") -> Tensor:
    """Forward: all_gather along `dim` (to `length` if uneven). Backward: reduce_scatter of the partial gradients."""
    return _apply(_AllGatherFrom, x, axis, dim, length, name)


def reduce_scatter_to(x: Tensor, axis: Axis, dim: int, *, name: str = "") -> Tensor:
    """Forward: reduce_scatter along `dim`. Backward: all_gather."""
    return _apply(_ReduceScatterTo, x, axis, dim, name)


def broadcast_from(x: Tensor, axis: Axis, source: int, *, name: str = "") -> Tensor:
    """Forward: the tensor of index `source`. Backward: the sum of gradients to the source, zeros elsewhere.

    Ranks other than the source pass a tensor of the same shape, whose values do not matter.
    """
    return _apply(_BroadcastFrom, x, axis, source, name)


def reduce_to(x: Tensor, axis: Axis, target: int, *, name: str = "") -> Tensor:
    """Forward: the sum at index `target`, zeros elsewhere. Backward: the target's gradient to everyone."""
    return _apply(_ReduceTo, x, axis, target, name)


def all_to_all_over(x: Tensor, axis: Axis, split_dim: int, join_dim: int, *, name: str = "") -> Tensor:
    """Forward: all_to_all, cut along `split_dim`, joined along `join_dim`. Backward: the way back."""
    return _apply(_AllToAll, x, axis, split_dim, join_dim, name)
