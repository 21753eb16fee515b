"""Measurements that are a number each: readers of files, latencies, what the doctor has measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes

from tozan.amounts import many, percent, scaled, seconds, three
from tozan.bench.result import Result, Row
from tozan.report.drawing import Figure, figure, rows_csv
from tozan.report.marks import AMBER, BLUE, GREY, INK, MUTED, bare

SHORTEST = 0.004
"""Of the longest bar: what is less is drawn so long, to be seen."""


def of_io(result: Result) -> list[Figure | None]:
    """Reads per second of every reader, and how long a read takes."""
    if result.kind != "io":
        return []
    rates = [row for row in result.rows if row.unit == "1/s"]
    return [
        bars("reads", "Documents or samples a second", rates, lambda row: f"{three(row.median)}/s"),
        _latencies([row for row in rates if row.get("p50_seconds")]),
    ]


def of_doctor(result: Result) -> list[Figure | None]:
    """Matrix products beside nominal peaks, and what memory costs."""
    if result.kind != "doctor":
        return []
    products = [row for row in result.rows if row.unit == "FLOP/s"]
    memory = [row for row in result.rows if row.unit == "s" and "64 MiB" in row.name]
    nominal = {name: peak.nominal for name, peak in result.peaks.items()}
    most = max((int(row.get("threads", 1)) for row in products), default=1)

    def peak(row: Row) -> float | None:
        return nominal.get(str(row.get("precision"))) if row.get("threads") == most else None

    def said(row: Row) -> str:
        best = peak(row)
        return scaled(row.median, "FLOP/s") + (f" ({percent(row.median / best)} of nominal)" if best else "")

    return [
        bars("products", "Matrix products by precision and threads", products, said, peak, "Line: nominal peak."),
        bars("buffers", "What a buffer of 64 MiB costs", memory, lambda row: seconds(row.median)),
    ]


def latencies_of_collectives(result: Result) -> Figure | None:
    """Seconds of the smallest message by collective, or by route."""
    rows = [row for row in result.rows if row.get("latency") and row.unit == "s"]
    return bars("latency", "Latency: 8 bytes", rows, lambda row: seconds(row.median))


def bars(
    name: str,
    title: str,
    rows: Sequence[Row],
    say: Callable[[Row], str],
    mark: Callable[[Row], float | None] = lambda _: None,
    caption: str = "",
) -> Figure | None:
    """A bar for each row with its name and value above it, and the interval of its median.

    Args:
        name: of the figure.
        title: of the figure.
        rows: of one unit.
        say: the value as text.
        mark: a value to mark on the bar's line, such as a nominal peak.
        caption: what the mark is; empty if there is none.
    """
    if not rows:
        return None
    ends = [max(row.high, mark(row) or 0.0) for row in rows]

    def draw(axes: Axes, _narrow: bool) -> None:
        for place, row in enumerate(rows):
            y = place + 0.2
            axes.barh(y, max(row.median, SHORTEST * max(ends)), height=0.34, color=BLUE)
            if row.high > row.low:
                axes.plot([row.low, row.high], [y, y], color=GREY, linewidth=1.6, solid_capstyle="butt")
            if at := mark(row):
                axes.plot([at, at], [y - 0.26, y + 0.26], color=AMBER, linewidth=1.8, solid_capstyle="butt")
            axes.annotate(f"{_label(row)}: {say(row)}", (0, place - 0.2), va="center", fontsize=9.8, color=INK)
        axes.set_xlim(0, max(ends) * 1.02)
        axes.set_ylim(len(rows) - 0.4, -0.5)
        bare(axes)
        axes.yaxis.set_visible(False)

    words = "; ".join(f"{_label(row)}: {say(row)}" for row in rows) + "."
    data = rows_csv(
        ("what", "unit", "median", "low", "high", "repeats"),
        [(row.name, row.unit, row.median, row.low, row.high, row.repeats) for row in rows],
    )
    caption = f"Thin line: interval of the median. {caption if any(map(mark, rows)) else ''}".strip()
    return figure(name, title, words, draw, data, caption, 26.0 + 36.0 * len(rows))


def _label(row: Row) -> str:
    if row.get("operation"):
        route = {"lo": "loopback"}.get(row.get("route", ""), row.get("route"))
        parts = (row["operation"].replace("_", " "), f"over {route}" if route else "", row.get("dtype") or "")
        return ", ".join(part for part in (*parts, many(row["ranks"], "rank")) if part)
    if row.get("threads"):
        return f"{row['precision']}, {many(row['threads'], 'thread')}"
    return row.name


def _latencies(rows: Sequence[Row]) -> Figure | None:
    """From the median of a read to its 99th percentile, on a logarithmic axis."""
    if not rows:
        return None
    spans = [(float(row["p50_seconds"]), float(row["p99_seconds"])) for row in rows]

    def draw(axes: Axes, narrow: bool) -> None:
        axes.set_xscale("log")
        low, high = min(p50 for p50, _ in spans), max(p99 for _, p99 in spans)
        for place, (row, (p50, p99)) in enumerate(zip(rows, spans, strict=True)):
            y = place + 0.2
            axes.plot([p50, p99], [y, y], color=GREY, linewidth=5, solid_capstyle="butt")
            axes.plot([p50], [y], "o", color=BLUE, markersize=7)
            text = f"{seconds(p50)} – {seconds(p99)}"
            axes.annotate(text, (p99, y), xytext=(7, 0), textcoords="offset points", va="center", fontsize=9.8)
            axes.annotate(row.name, (low / 1.6, place - 0.22), va="center", fontsize=9.6, color=MUTED)
        axes.set_xlim(low / 1.6, high * (high / low) ** (0.9 if narrow else 0.5))
        axes.set_ylim(len(rows) - 0.4, -0.5)
        bare(axes)
        axes.yaxis.set_visible(False)

    said = "; ".join(f"{row.name}: {seconds(a)} to {seconds(b)}" for row, (a, b) in zip(rows, spans, strict=True))
    data = rows_csv(("reader", "p50_seconds", "p99_seconds"), [(r.name, *s) for r, s in zip(rows, spans, strict=True)])
    caption = "Dot: median. Bar: up to the 99th percentile. Logarithmic."
    return figure("read-latency", "How long a read takes", said + ".", draw, data, caption, 26.0 + 36.0 * len(rows))
