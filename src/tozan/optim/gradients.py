"""The global gradient norm, and scaling by it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class GradientNorm:
    """Norm of all gradients together.

    Attributes:
        value: L2 norm over all parameters, of the unscaled gradient.
        culprit: the first parameter whose gradient is not finite, with its norm (inf or nan); None if all are finite.
    """

    value: float
    culprit: str | None


def gradient_norm(parameters: Mapping[str, nn.Parameter], scale: float = 1.0) -> GradientNorm:
    """L2 norm of the gradients divided by `scale`; summed over parameters in fp64 and in the order of their names.

    Args:
        parameters: those with a `.grad` count.
        scale: what the loss was multiplied by before the backward pass.
    """
    named = [(name, p.grad) for name, p in sorted(parameters.items()) if p.grad is not None]
    if not named:
        return GradientNorm(0.0, None)
    norms = torch.stack([n.double() for n in torch._foreach_norm([g for _, g in named])])
    value = float(norms.square().sum().sqrt()) / scale
    if math.isfinite(value):
        return GradientNorm(value, None)
    for (name, _), norm in zip(named, norms.tolist(), strict=True):
        if not math.isfinite(norm):
            return GradientNorm(value, f"gradient of {name} has norm {norm}")
    return GradientNorm(value, f"the gradient norm over all parameters is {value}")


def scale_gradients(parameters: Mapping[str, nn.Parameter], factor: float) -> None:
    """Multiply every gradient by `factor` in place; 1.0 costs nothing."""
    gradients: list[Tensor] = [p.grad for p in parameters.values() if p.grad is not None]
    if factor != 1.0 and gradients:
        torch._foreach_mul_(gradients, factor)


def clip_factor(norm: float, limit: float) -> float:
    """What to multiply gradients of norm `norm` by so that it becomes at most `limit`; `limit` 0 means no clipping."""
    return limit / norm if limit and norm > limit else 1.0
