"""LayerNorm and RMSNorm of a residual stream whose width is sharded.

The statistics are combined from those of the parts, two numbers per token (one for RMSNorm) in one all-gather; means
and squared deviations are combined by Chan's formula (Chan, Golub, LeVeque 1983), which does not cancel as
E[x²] − E[x]² would. Backward sums two numbers per token (one for RMSNorm) in one all-reduce.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tozan.comm import Axis, collectives
from tozan.parallel.scheme import Parameters


class ShardedNorm(nn.Module):
    """The norm of another module, on (..., D/n) of a width D over the n ranks of an axis.

    Args:
        module: an `nn.LayerNorm` or `nn.RMSNorm` over one dim.
        parameters: this rank's part of its weight and bias.
        axis: the ranks that have the other parts of the width.
    """

    def __init__(self, module: nn.Module, parameters: Parameters, axis: Axis) -> None:
        super().__init__()
        assert isinstance(module, (nn.LayerNorm, nn.RMSNorm))
        self.weight = parameters.get("weight")
        self.bias = parameters.get("bias")
        self._centred = isinstance(module, nn.LayerNorm)
        self._eps = module.eps
        self._axis = axis

    def forward(self, x: Tensor) -> Tensor:
        """Normalises in fp32 at least, and returns the type that came."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        eps = torch.finfo(x.dtype).eps if self._eps is None else self._eps
        y: Tensor = _Normalise.apply(wide, eps, self._centred, self._axis)  # type: ignore[no-untyped-call]
        if self.weight is not None:
            y = y * self.weight
        if self.bias is not None:
            y = y + self.bias
        return y.to(x.dtype)


class _Normalise(torch.autograd.Function):
    """(x − mean) / √(variance + eps), or x / √(mean square + eps), along a sharded last dim."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, centred: bool, axis: Axis) -> Tensor:
        """The normalised x, (..., D/n)."""
        if centred:
            variance, mean = torch.var_mean(x, dim=-1, correction=0)
            parts = collectives.all_gather(torch.stack((variance, mean))[None], axis, dim=0, name="norm statistics")
            variances, means = parts.unbind(1)
            mean = means.mean(dim=0)
            x = x - mean[..., None]
            square = variances.mean(dim=0) + (means - mean).square().mean(dim=0)
        else:
            part = x.square().mean(dim=-1)
            square = collectives.all_gather(part[None], axis, dim=0, name="norm statistics").mean(dim=0)
        scale = (square + eps).rsqrt()[..., None]
        y = x * scale
        ctx.save_for_backward(y, scale)
        ctx.centred, ctx.axis = centred, axis
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None, None]:
        """Scale · (g − mean(g) − y · mean(g·y)), without mean(g) for RMSNorm."""
        y, scale = ctx.saved_tensors
        g = gradients[0]
        width = y.shape[-1] * ctx.axis.size
        sums = [(g * y).sum(dim=-1), *([g.sum(dim=-1)] if ctx.centred else [])]
        means = collectives.all_reduce(torch.stack(sums), ctx.axis, name="norm gradient") / width
        dx = g - y * means[0, ..., None]
        if ctx.centred:
            dx -= means[1, ..., None]
        return dx.mul_(scale), None, None, None
