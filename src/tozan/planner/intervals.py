"""How far a prediction may be off.

Errors are multiplicative, so an interval is a factor each way. Its width is that of the errors on the machine's own
calibration rows: their 80% quantile for an 80% interval. A machine that nobody calibrated has a wide one in its file.
"""

from __future__ import annotations

from math import exp
from statistics import NormalDist

from tozan.planner.machine import Machine


def bounds(machine: Machine, seconds: float, level: float = 0.8) -> tuple[float, float]:
    """Seconds between which a measurement falls with probability `level`.

    Args:
        machine: its `spread` is the standard deviation of the logarithm.
        seconds: the prediction.
        level: probability, between 0 and 1.
    """
    width = exp(NormalDist().inv_cdf((1 + level) / 2) * machine.spread)
    return seconds / width, seconds * width
