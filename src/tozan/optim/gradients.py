"""The global gradient norm, and clipping by it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from tozan.layout import SEGMENT
from tozan.ops import many


@dataclass(frozen=True)
class GradientNorm:
    """Norm of all gradients together.

    Attributes:
        value: L2 norm over all parameters, of the unscaled gradient.
        culprit: the first parameter whose gradient is not finite, with its norm (inf or nan); None if all are finite.
    """

    value: float
    culprit: str | None


def segment_squares(gradient: Tensor) -> Tensor:
    """Sum of squares of every `SEGMENT` neighbouring elements, in row-major order; the last segment may be short.

    Args:
        gradient: of any shape.

    Returns:
        (segments,) in fp64.
    """
    flat = gradient.detach().reshape(-1)
    whole = flat.numel() // SEGMENT * SEGMENT
    norms = torch.linalg.vector_norm(flat[:whole].view(-1, SEGMENT), dim=1)
    if whole < flat.numel():
        # Padded, because a sum over fewer elements is made in another order.
        last = torch.nn.functional.pad(flat[whole:], (0, SEGMENT - flat.numel() + whole))
        norms = torch.cat((norms, torch.linalg.vector_norm(last.view(1, SEGMENT), dim=1)))
    squares: Tensor = norms.double().square()
    return squares


def sums_of_squares(squares: Mapping[str, Tensor]) -> dict[str, float]:
    """Every parameter's sum of squares from its segments, (segments,) in fp64 each."""
    if not squares:
        return {}
    if many.usable(list(squares.values())):
        return dict(zip(squares, many.sums(list(squares.values())).tolist(), strict=True))
    # NumPy adds on one thread, always in the same order.
    return {name: float(np.sum(square.cpu().numpy())) for name, square in squares.items()}


def norm_of_sums(sums: Mapping[str, float], scale: float = 1.0) -> GradientNorm:
    """The norm from every parameter's sum of squares, added in the order of names.

    Args:
        sums: of each parameter of the whole model.
        scale: what the loss was multiplied by before the backward pass.
    """
    value = math.sqrt(sum(sums[name] for name in sorted(sums))) / scale
    if math.isfinite(value):
        return GradientNorm(value, None)
    for name, total in sorted(sums.items()):
        if not math.isfinite(total):
            return GradientNorm(value, f"gradient of {name} has norm {math.sqrt(total)}")
    return GradientNorm(value, f"the gradient norm over all parameters is {value}")


def gradient_norm(parameters: Mapping[str, nn.Parameter], scale: float = 1.0) -> GradientNorm:
    """L2 norm of the gradients divided by `scale`: the same bits however parameters are sharded at segments.

    Args:
        parameters: those with a `.grad` count.
        scale: what the loss was multiplied by before the backward pass.
    """
    return norm_of_sums(sums_of_squares(squares_of(parameters)), scale)


def squares_of(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """`segment_squares` of every gradient there is."""
    gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    if many.usable(list(gradients.values())) and all(g.dtype == torch.float32 for g in gradients.values()):
        return dict(zip(gradients, many.segment_squares(list(gradients.values()), SEGMENT), strict=True))
    return {name: segment_squares(gradient) for name, gradient in gradients.items()}


def clip_factor(norm: float, limit: float) -> float:
    """What to multiply gradients of norm `norm` by so that it becomes at most `limit`; `limit` 0 means no clipping."""
    return limit / norm if limit and norm > limit else 1.0
