"""What stands between an MLP's products: GELU and SwiGLU, forward and backward in one pass over memory each.

In bf16 the kernels compute in fp32 and round once at the end, as PyTorch's GELU does; plain SwiGLU rounds SiLU, too.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tozan.ops import native


def gelu_reference(x: Tensor) -> Tensor:
    """What `gelu` computes, by PyTorch's own operation."""
    return F.gelu(x, approximate="tanh")


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form (arXiv 1606.08415), as GPT-2 was trained; of any shape and type."""
    if native.usable(x):
        return _Gelu.apply(x.contiguous())  # type: ignore[no-any-return, no-untyped-call]
    return gelu_reference(x)


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """What `swiglu` computes, in plain PyTorch."""
    return F.silu(gate) * up


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """The inner part of SwiGLU (arXiv 2002.05202): silu(gate) · up, two tensors of one shape and type."""
    if native.usable(gate, up) and gate.dtype == up.dtype and gate.shape == up.shape:
        return _SwiGLU.apply(gate.contiguous(), up.contiguous())  # type: ignore[no-any-return, no-untyped-call]
    return swiglu_reference(gate, up)


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        y = torch.empty_like(x)
        native.call("gelu", x.dtype, x, y, x.numel())
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        dx = torch.empty_like(x)
        native.call("gelu_backward", x.dtype, dy.contiguous(), x, dx, x.numel())
        return dx


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        y = torch.empty_like(gate)
        native.call("swiglu", gate.dtype, gate, up, y, gate.numel())
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        native.call("swiglu_backward", gate.dtype, dy.contiguous(), gate, up, dgate, dup, gate.numel())
        return dgate, dup
