"""How far a prediction may be off.

Errors are multiplicative, so an interval is a factor each way. Its width is that of the errors on the machine's own
calibration rows: their 80% quantile for an 80% interval. A machine that nobody calibrated has a wide one in its file.
"""

from __future__ import annotations

from math import exp, hypot
from statistics import NormalDist

from tozan.planner.machine import Machine

UNMEASURED = 0.15
"""Added (in quadrature) to the spread for a trainer of which no run on such a machine has been compared: assumed."""


def bounds(machine: Machine, seconds: float, level: float = 0.8, measured: bool = True) -> tuple[float, float]:
    """Seconds between which a measurement falls with probability `level`.

    Args:
        machine: its `spread` is the standard deviation of the logarithm.
        seconds: the prediction.
        level: probability, between 0 and 1.
        measured: the trainer's runs are among those that `spread` comes from.
    """
    spread = hypot(machine.spread, 0.0 if measured else UNMEASURED)
    width = exp(NormalDist().inv_cdf((1 + level) / 2) * spread)
    return seconds / width, seconds * width
