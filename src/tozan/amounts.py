"""Numbers as a terminal or a page says them; torch-free."""

from __future__ import annotations

import math

UNKNOWN = "—"


def scaled(value: float, unit: str = "", digits: int = 3) -> str:
    """A value with a metric prefix: `scaled(1.8e11, "FLOP/s")` is `180 GFLOP/s`, `scaled(2e-5, "s")` is `20 µs`.

    Args:
        value: how much; infinite or not a number if it is not known.
        unit: of what. Only seconds get prefixes below one.
        digits: that count.
    """
    if not math.isfinite(value):
        return UNKNOWN
    powers = ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k"), (0, ""), (-3, "m"), (-6, "µ"), (-9, "n"))
    for power, prefix in powers if unit == "s" else powers[:6]:
        if abs(value) >= (1 - 0.5 * 10.0**-digits) * 10.0**power:
            return f"{value / 10.0**power:.{digits}g} {prefix}{unit}"
    return f"{value:.{digits}g} {unit}"


def percent(share: float) -> str:
    """A share in three digits at most: `0.344` is `34.4%`."""
    return f"{100 * share:.3g}%" if math.isfinite(share) else UNKNOWN
