"""LayerNorm and RMSNorm of a residual stream, from its type to that of the product that reads the result.

The stream is fp32 in mixed precision, and what follows a norm is a matrix product: so the result is rounded as it is
written, and nobody casts it. A kernel reads each row once, forward and backward, and keeps two numbers of it; gradients
of weight and bias are added up in the same order on any number of threads.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tozan.ops import native
from tozan.ops.products import compute_dtype

_KINDS = {(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)}
"""Types of the stream and of the result that there are kernels for."""
_TOGETHER = 32
"""Rows whose gradients of weight and bias the kernel adds up first (`norms.h`)."""


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """What `layer_norm` computes, by PyTorch's own operation."""
    return F.layer_norm(x, weight.shape, weight, bias, eps).to(compute_dtype(x))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm (arXiv 1607.06450) over the last dim, computed in fp32 at least.

    Args:
        x: (…, D).
        weight: (D,).
        bias: (D,), or None.
        eps: added to the variance.

    Returns:
        (…, D) in autocast's type if that is on, else in that of x.
    """
    if _usable(x, weight, bias):
        return _Norm.apply(x, weight, bias, eps, True)  # type: ignore[no-any-return, no-untyped-call]
    return layer_norm_reference(x, weight, bias, eps)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """What `rms_norm` computes, by PyTorch's own operation."""
    return F.rms_norm(x, weight.shape, weight, eps).to(compute_dtype(x))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm (arXiv 1910.07467) over the last dim; arguments and result as those of `layer_norm`."""
    if _usable(x, weight, None):
        return _Norm.apply(x, weight, None, eps, False)  # type: ignore[no-any-return, no-untyped-call]
    return rms_norm_reference(x, weight, eps)


def _usable(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the kernel takes a norm."""
    kept_wide = weight.dtype == torch.float32 and (bias is None or bias.dtype == torch.float32)
    return kept_wide and (x.dtype, compute_dtype(x)) in _KINDS and native.usable(x, weight, bias)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, centred: bool) -> Tensor:
        x = x.contiguous()
        y = torch.empty_like(x, dtype=compute_dtype(x))
        rows = x.numel() // max(1, x.shape[-1])
        kept = x.new_empty(rows, 2, dtype=torch.float32)
        native.call("norm", x.dtype, x, rows, x.shape[-1], weight, bias, eps, centred, y, kept, into=y.dtype)
        ctx.save_for_backward(x, weight, kept)
        ctx.biased, ctx.centred = bias is not None, centred
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None, None]:
        x, weight, kept = ctx.saved_tensors
        rows, width = len(kept), x.shape[-1]
        dx, dweight = torch.empty_like(x), torch.empty_like(weight)
        dbias = torch.empty_like(weight) if ctx.biased else None
        parts = weight.new_empty(-(-rows // _TOGETHER), 2, width)
        given = dy.contiguous(), x, rows, width, weight, kept, ctx.centred
        native.call("norm_backward", x.dtype, *given, dx, dweight, dbias, parts, into=dy.dtype)
        return dx, dweight, dbias, None, None
