"""Strong and weak scaling: the curve with ideal, measured and predicted, its breakdown, and the talk's FLOP/s table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator

from tozan.amounts import percent, scaled, seconds
from tozan.bench.result import Peak, Result, Row
from tozan.report.drawing import Figure, figure, rows_csv
from tozan.report.marks import AMBER, BLUE, GREY, MUTED, key, phase_colour, titled
from tozan.report.words import phase_words, time_tick

A100 = 137e12
"""FLOP/s that the talk takes an A100 to achieve, from Megatron's 1.7B set-up (arXiv 2104.04473, table 1)."""


@dataclass(frozen=True)
class Point:
    """One number of ranks.

    Attributes:
        ranks: processes.
        replicas: data-parallel ones.
        parts: ranks that share one model.
        seconds: of a step.
        low: lower end of its interval.
        high: upper end.
        tokens: tokens/s.
        flops: model FLOP/s of all ranks.
        predicted: seconds by the planner, or None.
        phases: seconds by phase.
        peak: of one rank; None where the measurement does not say it.
    """

    ranks: int
    replicas: int
    parts: int
    seconds: float
    low: float
    high: float
    tokens: float
    flops: float
    predicted: float | None
    phases: dict[str, float]
    peak: Peak | None = None


def points(result: Result, mode: str = "strong") -> list[Point]:
    """The rows of a scaling measurement, fewest ranks first."""
    rows = [row for row in result.rows if row.get("ranks") and row.get("mode", "strong") == mode]
    whole = result.peaks.get(str(result.options.get("precision"))) or next(iter(result.peaks.values()), None)
    return sorted((_point(row, whole) for row in rows), key=lambda point: (point.parts, point.ranks))


def _point(row: Row, whole: Peak | None) -> Point:
    layout = row.get("layout") or {}
    replicas = int(layout.get("data", layout.get("dp", 0)) or 0)
    ranks = int(row["ranks"])
    replicas = replicas or ranks
    in_seconds = row.unit == "s"
    middle = float(row.get("seconds") or row.median)
    low, high = (row.low, row.high) if in_seconds else (middle, middle)
    return Point(
        ranks,
        replicas,
        max(1, ranks // replicas),
        middle,
        low,
        high,
        float(row.get("tokens_per_second") or float("nan")),
        float(row.get("flops_per_second") or float("nan")),
        row.get("predicted_seconds"),
        dict(row.get("phases") or {}),
        Peak.model_validate(row["peak"]) if row.get("peak") else whole,
    )


def curve(found: Sequence[Point], mode: str = "strong") -> Figure | None:
    """Seconds of a step over ranks: ideal, measured, predicted."""
    if len(found) < 2:
        return None
    x = np.array([point.ranks for point in found], dtype=np.float64)
    y = np.array([point.seconds for point in found])
    ideal = y[0] * (x[0] / x if mode == "strong" else np.ones_like(x))
    forecast = [(point.ranks, point.predicted) for point in found if point.predicted]

    def draw(axes: Axes, _narrow: bool) -> None:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.plot(x, ideal, color=GREY, linewidth=1.2, linestyle=(0, (4, 3)))
        names = [("ideal", float(ideal[-1]), MUTED), ("measured", float(y[-1]), BLUE)]
        if forecast:
            axes.plot(*zip(*forecast, strict=True), color=AMBER, marker="s", markersize=4, linewidth=1.2)
            names.append(("predicted", float(forecast[-1][1] or 0.0), AMBER))
        spread = [[point.seconds - point.low for point in found], [point.high - point.seconds for point in found]]
        axes.errorbar(x, y, yerr=np.maximum(spread, 0), color=BLUE, marker="o", markersize=4.5, capsize=2.5)
        _ranks_axis(axes, x.tolist())
        values = [*y.tolist(), *ideal.tolist(), *(float(value or 0) for _, value in forecast)]
        axes.set_ylim(min(values) / 1.25, max(values) * 1.25)
        ticks = np.geomspace(min(values), max(values), 4)
        axes.yaxis.set_major_locator(FixedLocator([float(f"{tick:.2g}") for tick in ticks]))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(time_tick)
        titled(axes, "ranks", "time of a step")
        _label_log_ends(axes, float(x[-1]), names)

    efficiency = float(ideal[-1] / y[-1])
    words = (
        f"From {found[0].ranks:,} to {found[-1].ranks:,} ranks a step goes from {seconds(y[0])} to {seconds(y[-1])}: "
        f"{percent(efficiency)} of ideal."
    )
    if forecast and found[-1].predicted:
        words += f" Predicted: {seconds(found[-1].predicted)}."
    data = rows_csv(
        ("ranks", "seconds", "low", "high", "ideal_seconds", "predicted_seconds", "tokens_per_second"),
        [
            (point.ranks, point.seconds, point.low, point.high, best, point.predicted, point.tokens)
            for point, best in zip(found, ideal.tolist(), strict=True)
        ],
    )
    title = "Strong scaling: the same batch on more ranks" if mode == "strong" else "Weak scaling: a batch per rank"
    return figure(f"{mode}-scaling", title, words, draw, data, "Bars: interval of the median.", 290.0)


def _label_log_ends(axes: Axes, x: float, names: list[tuple[str, float, str]]) -> None:
    """`label_ends` where the scale is logarithmic: the distances are those of the logarithms."""
    low, high = np.log(axes.get_ylim())
    apart, previous = 0.085 * (high - low), -np.inf
    for name, value, colour in sorted(names, key=lambda entry: entry[1]):
        place = max(float(np.log(value)), previous + apart)
        previous = place
        axes.annotate(
            name, (x, float(np.exp(place))), xytext=(7, 0), textcoords="offset points", color=colour, va="center",
            annotation_clip=False,
        )  # fmt: skip


def _ranks_axis(axes: Axes, ranks: list[float]) -> None:
    shown = sorted(set(ranks))
    axes.xaxis.set_major_locator(FixedLocator(shown[:: max(1, len(shown) // 6)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def breakdown(found: Sequence[Point], mode: str = "strong") -> Figure | None:
    """Stacked phases for each number of ranks: the talk's breakdowns."""
    found = [point for point in found if point.phases]
    if len(found) < 2:
        return None
    names = list(dict.fromkeys(name for point in found for name in point.phases))
    totals = {point.ranks: sum(point.phases.values()) for point in found}
    names = [name for name in names if any(p.phases.get(name, 0.0) > 0.004 * totals[p.ranks] for p in found)]

    def draw(axes: Axes, narrow: bool) -> None:
        bottom = np.zeros(len(found))
        for name in names:
            values = np.array([point.ranks * point.phases.get(name, 0.0) for point in found])
            axes.bar(range(len(found)), values, bottom=bottom, width=0.68, color=phase_colour(name, names))
            bottom += values
        axes.set_xticks(range(len(found)), [f"{point.ranks:,}" for point in found])
        axes.yaxis.set_major_formatter(time_tick)
        axes.locator_params(axis="y", nbins=5)
        titled(axes, "ranks", "time of a step × ranks")
        key(axes, [(phase_words(name), phase_colour(name, names)) for name in names], narrow, -0.17)

    first, last = found[0], found[-1]
    grown = max(
        names, key=lambda name: last.phases.get(name, 0.0) - first.phases.get(name, 0.0) * first.ranks / last.ranks
    )
    words = (
        f"On {last.ranks:,} ranks: "
        + ", ".join(
            f"{phase_words(name)} {percent(last.phases.get(name, 0.0) / sum(last.phases.values()))}" for name in names
        )
        + f". What keeps it from scaling most is {phase_words(grown)}."
    )
    data = rows_csv(("ranks", *names), [(p.ranks, *(p.phases.get(name, 0.0) for name in names)) for p in found])
    rows = -(-len(names) // 3)
    caption = "Bars of equal height would be ideal: what grows is what keeps it from scaling."
    title = "Breakdown of a step by ranks"
    return figure(f"{mode}-breakdown", title, words, draw, data, caption, 262.0 + 14.0 * rows)


TALK_HEAD = (
    "# CPUs",
    "# DP",
    "# MP",
    "TFLOP/s per CPU",
    "% of nominal peak",
    "% of measured peak",
    "aggregate PFLOP/s",
    "A100s",
)


def talk_table(found: Sequence[Point]) -> list[tuple[str, ...]]:
    """The talk's FLOP/s table, its percentages of both peaks."""
    rows: list[tuple[str, ...]] = []
    for point in found:
        if not np.isfinite(point.flops):
            continue
        each = point.flops / point.ranks
        peaks = (point.peak.nominal, point.peak.measured) if point.peak else (None, None)
        rows.append(
            (
                f"{point.ranks:,}",
                f"{point.replicas:,}",
                f"{point.parts:,}",
                f"{each / 1e12:.3g}",
                *(percent(each / peak) if peak else "—" for peak in peaks),
                f"{point.flops / 1e15:.3g}",
                f"{point.flops / A100:.3g}",
            )
        )
    return rows


def talk_note(peak: Peak | None) -> str:
    """The conventions of the table.

    Args:
        peak: of a rank, where there are fewest.
    """
    of = "not known"
    if peak:
        made = f"{scaled(peak.nominal, 'FLOP/s')} = {peak.how}" if peak.nominal else f"not known: {peak.how}"
        of = f"of a rank, measured, {scaled(peak.measured, 'FLOP/s')}; nominal, {made.removesuffix(': ')}"
    return (
        "A CPU is a rank. FLOP/s are the model's (3 × forward, recomputation left out) over the time of a step. "
        f"Peak {of}. PFLOP/s are 10¹⁵. A100s: at the 137 TFLOP/s that an A100 achieves on 1.7B parameters; the talk "
        "divides by 1,024 there instead of 1,000."
    )
