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


def many(count: int, noun: str) -> str:
    """A number of things: `1 rank`, `4,096 ranks`, `2 processes`."""
    plural = "" if count == 1 else "es" if noun.endswith("s") else "s"
    return f"{count:,} {noun}{plural}"


def percent(share: float) -> str:
    """A share in three digits at most: `0.344` is `34.4%`."""
    return f"{100 * share:.3g}%" if math.isfinite(share) else UNKNOWN


def duration(seconds: float) -> str:
    """A span of time in its two largest units: `3 min 20 s`, `2 h 05 min`, `4 d 3 h`."""
    if not math.isfinite(seconds):
        return "—"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if days:
        return f"{days} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes % 60:02d} min"
    return f"{minutes} min {whole % 60:02d} s" if minutes else f"{whole} s"


def seconds(value: float) -> str:
    """A short time in the unit that suits it."""
    if 0 < value < 1e-3:
        return f"{1e6 * value:.3g} µs"
    return duration(value) if value >= 10 else f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.3g} ms"


def three(value: float) -> str:
    """A number in three digits, without an exponent while it has a use: `1,360`, `23.4`, `0.052`."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def days(count: float) -> str:
    """The length of a run: `126 days`, `2 h 05 min` where it is less than a day."""
    return f"{three(count)} days" if count >= 1 else duration(86_400 * count)
