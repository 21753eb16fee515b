"""Rotary positions in one pass over queries, keys and values as they lie side by side, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tozan.ops import native


def rotate_reference(x: Tensor, cos: Tensor, sin: Tensor, turned: int) -> Tensor:
    """What `rotate` computes, in plain PyTorch."""
    part, rest = torch.split(x, [turned, x.shape[-2] - turned], dim=-2)
    first, second = part.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
    return torch.cat((rotated, rest), dim=-2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, turned: int) -> Tensor:
    """Rotary position embedding (RoFormer, arXiv 2104.09864), pairing element i with i + S/2 as LLaMA's weights do.

    Computes in fp32 at least. The gradient is one tensor like x, as the projection that made x wants it.

    Args:
        x: heads of each token, (B, T, heads, S): queries and keys, then others.
        cos: cosines of each position's angles, (T, S/2) in fp32.
        sin: sines, likewise.
        turned: how many heads, from the first on, are turned; the others stay as they are.

    Returns:
        (B, T, heads, S) of x's type.
    """
    if native.usable(x, cos, sin) and cos.dtype == sin.dtype == torch.float32:
        return _Rotate.apply(x, cos, sin, turned)  # type: ignore[no-any-return, no-untyped-call]
    return rotate_reference(x, cos, sin, turned)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, turned: int) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.turned = turned
        return _turn(x, cos, sin, turned, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(dy, cos, sin, ctx.turned, back=True), None, None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, turned: int, *, back: bool) -> Tensor:
    """The kernel; the gradient of a rotation is the rotation back."""
    x = x.contiguous()
    y = torch.empty_like(x)
    native.call("rotate", x.dtype, x, *x.shape, turned, cos.contiguous(), sin.contiguous(), back, y)
    return y
