"""Two measurements row by row: by how much they differ, and whether that is more than noise. Torch-free."""

from __future__ import annotations

import math
from dataclasses import dataclass
from math import comb

from tozan.bench.result import CONFIDENCE, Result, Row


@dataclass(frozen=True)
class Difference:
    """One row of both files.

    Attributes:
        name: the row's.
        unit: of both medians.
        a: median of the first file.
        b: median of the second.
        ratio: b / a; NaN where a is 0.
        low: smallest ratio that the intervals of both medians allow.
        high: largest.
        verdict: `differs`, `within noise`, `too few repeats`, or `other unit`.
    """

    name: str
    unit: str
    a: float
    b: float
    ratio: float
    low: float
    high: float
    verdict: str


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Attributes:
        differences: rows of both files, in the order of the first.
        warnings: why the files may not be comparable.
        missing: names that only one of the files has.
        alike: whether both are of one kind and from one kind of machine; where not, the differences say little.
    """

    differences: list[Difference]
    warnings: list[str]
    missing: list[str]
    alike: bool


def compare(a: Result, b: Result) -> Comparison:
    """Set two measurements side by side.

    A row differs if the two medians' intervals do not touch. Were nothing different, that would happen in fewer than
    1 of 20 rows: 95% intervals keep it below 1 in 100, and for so few repeats that an interval is the whole range, n
    and m samples of one distribution lie apart with probability 2·n!·m!/(n+m)!; where that is above 1/20 the row has
    too few repeats to tell. This is the noise within each measurement; what changed on the machine between the two
    (load, clock, temperature) is not in it, so repeat both before you believe in a small difference.
    """
    others = {row.name: row for row in b.rows}
    differences = [_difference(row, others[row.name]) for row in a.rows if row.name in others]
    shared = {found.name for found in differences}
    missing = [row.name for row in (*a.rows, *b.rows) if row.name not in shared]
    alike = a.kind == b.kind and all(a.machine.get(name) == b.machine.get(name) for name in ("processor", "cores"))
    return Comparison(differences, _warnings(a, b), missing, alike)


def _difference(a: Row, b: Row) -> Difference:
    ratio, low, high = _divide(b.median, a.median), _divide(b.low, a.high), _divide(b.high, a.low)
    if a.unit != b.unit:
        ratio, low, high, verdict = math.nan, math.nan, math.nan, "other unit"
    elif 2 / comb(a.repeats + b.repeats, a.repeats) > 1 - CONFIDENCE:
        verdict = "too few repeats"
    else:
        verdict = "differs" if a.high < b.low or b.high < a.low else "within noise"
    return Difference(a.name, a.unit, a.median, b.median, ratio, low, high, verdict)


def _divide(a: float, b: float) -> float:
    return a / b if b else math.nan


def _warnings(a: Result, b: Result) -> list[str]:
    found = []
    if a.kind != b.kind:
        found.append(f"one is of kind {a.kind}, the other of kind {b.kind}: only rows of the same name are compared")
    for table in ("machine", "versions", *(["options"] if a.kind == b.kind else [])):
        mine, other = getattr(a, table), getattr(b, table)
        names = [name for name in {**mine, **other} if mine.get(name) != other.get(name) and name != "out"]
        found += [f"{table}: {name} is {mine.get(name)!r} against {other.get(name)!r}" for name in names]
    return found
