"""Steps that look odd: a loss or a gradient norm far above those before it, by a robust z-score."""

from __future__ import annotations

import math
from collections import deque

import numpy as np

WINDOW = 64
"""Steps to compare with: enough for a stable spread, few enough to follow the fall of a loss."""
ENOUGH = 16
"""Steps before anything is judged. While a learning rate warms up, window and spread move along with it."""
FLOOR = {"loss": 0.02, "grad_norm": 0.05}
"""Smallest spread: of the loss in nats, of the norm in natural logarithms. A curve that is nearly flat is no reason to
be alarmed by a small change."""


class Outliers:
    """Judges each step's loss and gradient norm against the last `WINDOW`.

    The score is (x - median) / (1.4826 · MAD), MAD being the median distance from the median, for the loss and for the
    logarithm of the norm. Both are robust: up to half of the window may itself be odd (Leys et al. 2013,
    10.1016/j.jesp.2013.03.013). Only what is above counts.

    Args:
        limit: a score above this is odd.
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._past: dict[str, deque[float]] = {name: deque(maxlen=WINDOW) for name in FLOOR}

    def judge(self, loss: float, grad_norm: float) -> str | None:
        """What is odd about a step, in words; None if nothing is."""
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            return f"loss {loss:.4g} and gradient norm {grad_norm:.4g}"
        for name, value, seen in (("loss", loss, loss), ("grad_norm", grad_norm, _log(grad_norm))):
            past = np.array(self._past[name])
            if len(past) < ENOUGH:
                continue
            median = float(np.median(past))
            spread = max(1.4826 * float(np.median(np.abs(past - median))), FLOOR[name])
            score = (seen - median) / spread
            if score > self._limit:
                return f"{name} {value:.4g} is {score:.0f} robust standard deviations above the last {len(past)} steps"
        return None

    def record(self, loss: float, grad_norm: float) -> None:
        """Take an accepted step into the window."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self._past["loss"].append(loss)
            self._past["grad_norm"].append(_log(grad_norm))

    def forget(self) -> None:
        """Begin anew, as after a rollback."""
        for past in self._past.values():
            past.clear()


def _log(norm: float) -> float:
    return math.log(max(norm, 1e-30))
