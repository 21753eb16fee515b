"""How fast this machine multiplies and sends: the roofline with every matrix product, collectives by size."""

from __future__ import annotations

from math import ceil
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from tozan.amounts import percent, scaled
from tozan.bench.result import Result, Row
from tozan.report.drawing import Figure, figure, rows_csv
from tozan.report.marks import SERIES, key, powers, titled

DASHES: tuple[Any, ...] = ("solid", (0, (5, 2)), (0, (1, 1.6)), (0, (6, 2, 1, 2)))
DASH_NAMES = ("solid", "dashed", "dotted", "dash and dot")
ITEM = {"fp32": 4, "bf16": 2, "fp16": 2, "fp64": 8}


def flops_of(row: Row) -> float:
    """FLOPs of one call of a product."""
    return 2.0 * float(row["m"]) * float(row["n"]) * float(row["k"]) * float(row.get("batch", 1))


def bytes_of(row: Row) -> float:
    """Bytes that a product must read and write at least: both operands and the result, once."""
    stated = row.get("bytes")
    if stated:
        return float(stated)
    m, n, k, item = _sizes(row)
    return float(row.get("batch", 1)) * item * (m * k + k * n + m * n)


def _sizes(row: Row) -> tuple[float, float, float, float]:
    return float(row["m"]), float(row["n"]), float(row["k"]), float(ITEM.get(str(row.get("precision")), 4))


def rate_of(row: Row) -> float:
    """Measured FLOP/s of a product."""
    return float(row.get("flops_per_second") or row.median)


def roofline(result: Result) -> Figure | None:
    """Every matrix product by its arithmetic intensity and its rate, under the roofs of memory and of each precision.

    Williams et al., Roofline, CACM 2009: a product of intensity I (FLOPs per byte moved) runs at no more than
    min(peak, I × bandwidth).
    """
    rows = _most_threads(result)
    if not rows:
        return None
    threads = int(rows[0].get("threads", 1))
    precisions = list(dict.fromkeys(str(row.get("precision", "fp32")) for row in rows))
    colours = dict(zip(precisions, SERIES, strict=False))
    x = {row.name: flops_of(row) / bytes_of(row) for row in rows}
    rates = [rate_of(row) for row in rows]
    peaks = {name: peak.measured for name, peak in result.peaks.items() if name in precisions}
    nominal = [peak.nominal for peak in result.peaks.values() if peak.nominal]
    low, high = min(x.values()) / 2, max(x.values()) * 2
    if result.bandwidth and peaks:
        low = min(low, min(peaks.values()) / result.bandwidth / 4)
    largest = max([row.get("share") or 0.0 for row in rows]) or 1.0

    def draw(axes: Axes, narrow: bool) -> None:
        powers(axes)
        axes.set_xlim(low, high)
        axes.set_ylim(min(rates) / 2.5, max([*rates, *peaks.values(), *nominal]) * 2.2)
        across = np.geomspace(low, high, 60)
        for name, peak in peaks.items():
            roof = np.minimum(peak, across * result.bandwidth) if result.bandwidth else np.full(60, peak)
            axes.plot(across, roof, color=colours[name], linewidth=1.2)
            if data_sheet := result.peaks[name].nominal:
                axes.plot([low, high], [data_sheet] * 2, color=colours[name], linewidth=1.0, linestyle=(0, (4, 3)))
        for row in rows:
            size = 12 + 90 * (row.get("share") or 0.0) / largest
            colour = colours[str(row.get("precision", "fp32"))]
            axes.scatter([x[row.name]], [rate_of(row)], s=size, color=colour, alpha=0.6, linewidths=0)
        titled(axes, "FLOPs per byte moved", "FLOP/s")
        axes.yaxis.set_major_formatter(lambda value, _: scaled(value, ""))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        key(axes, [(name, colours[name]) for name in precisions], narrow, -0.2)

    words = _roofline_words(result, rows, precisions)
    data = _roofline_csv(rows, x)
    caption = (
        f"A dot is a matrix product, as large as its share of the step's FLOPs; threads: {threads}. "
        "Lines: what memory and multipliers allow, measured; dashed: nominal peaks."
    )
    return figure("roofline", "Roofline of the step's matrix products", words, draw, data, caption, 320.0)


def _roofline_words(result: Result, rows: list[Row], precisions: list[str]) -> str:
    """The rate over all products of the step by precision, weighted by their FLOPs."""
    said = []
    for name in precisions:
        mine = [row for row in rows if str(row.get("precision", "fp32")) == name]
        shares = [row.get("share") or 0.0 for row in mine]
        weight = shares if sum(shares) > 0 else [1.0] * len(mine)
        mean = sum(weight) / sum(w / rate_of(row) for w, row in zip(weight, mine, strict=True))
        peak = result.peaks[name].measured if name in result.peaks else None
        said.append(
            f"{name}: {scaled(mean, 'FLOP/s')} over the step's products"
            + (f", {percent(mean / peak)} of the measured peak of {scaled(peak, 'FLOP/s')}" if peak else "")
        )
    words = "; ".join(said) + "."
    if result.bandwidth:
        words += f" Memory moves {scaled(result.bandwidth, 'B/s')}."
    return words


def _roofline_csv(rows: list[Row], intensity: dict[str, float]) -> str:
    own = ("direction", "precision", "threads", "m", "n", "k", "batch")
    lines = [
        (row.name, *(row.get(field) for field in own), intensity[row.name], rate_of(row), row.get("share"))
        for row in rows
    ]
    return rows_csv(("name", *own, "flops_per_byte", "flops_per_second", "share_of_step"), lines)


def slowest_products(result: Result, most: int = 12) -> list[tuple[str, ...]]:
    """The products that take most of the step's time: name, shape, precision, rate, share of peak, share of time.

    Those with the most threads; shares of time are of all products in the same precision and split.
    """
    rows = _most_threads(result)
    times = {row.name: (row.get("share") or flops_of(row)) / rate_of(row) for row in rows}
    totals: dict[tuple[object, object], float] = {}
    for row in rows:
        group = row.get("precision"), row.get("tensor")
        totals[group] = totals.get(group, 0.0) + times[row.name]
    made: list[tuple[str, ...]] = []
    precisions = list(dict.fromkeys(row.get("precision") for row in rows))
    slowest = sorted(rows, key=lambda row: -times[row.name])
    each = ceil(most / max(1, len(precisions)))
    for row in (row for one in precisions for row in [r for r in slowest if r.get("precision") == one][:each]):
        peak = result.peaks.get(str(row.get("precision")))
        batch = f"{int(row.get('batch', 1)):,} × " if int(row.get("batch", 1)) > 1 else ""
        name = f"{row['product']}, {row['direction']}" if row.get("product") else row.name
        made.append(
            (
                name,
                f"{batch}{int(row['m']):,} × {int(row['n']):,} × {int(row['k']):,}",
                str(row.get("precision", "")),
                scaled(rate_of(row), "FLOP/s"),
                percent(row.get("peak_share") or rate_of(row) / peak.measured) if peak else "—",
                percent(rate_of(row) / peak.nominal) if peak and peak.nominal else "—",
                percent(times[row.name] / totals[row.get("precision"), row.get("tensor")]),
            )
        )
    return made


def _most_threads(result: Result) -> list[Row]:
    """The matrix products that were measured with the most threads."""
    rows = [row for row in result.rows if result.kind == "gemm" and row.get("m")]
    threads = max((int(row.get("threads", 1)) for row in rows), default=1)
    return [row for row in rows if int(row.get("threads", 1)) == threads]


def collectives(result: Result) -> Figure | None:
    """Bandwidth of each collective, or over each route, by the size of its message.

    What tells curves apart first (operation or route) has a colour, the rest (type, ranks) a dash.
    """
    rows = [row for row in result.rows if row.unit == "bytes/s" and row.get("bytes") and row.get("operation")]
    if not rows:
        return None
    told = [one for one in ("operation", "route", "dtype", "ranks") if len({row.get(one) for row in rows}) > 1]
    curves: dict[tuple[str, ...], list[tuple[float, float]]] = {}
    for row in rows:
        label = tuple(_value(one, row.get(one)) for one in told or ["operation"])
        curves.setdefault(label, []).append((float(row["bytes"]), row.median))
    colours = dict(zip(dict.fromkeys(label[0] for label in curves), SERIES, strict=False))
    dashes = dict(zip(dict.fromkeys(label[1:] for label in curves), DASHES, strict=False))
    shown = {label: sorted(curve) for label, curve in curves.items() if label[0] in colours and label[1:] in dashes}

    def draw(axes: Axes, narrow: bool) -> None:
        powers(axes)
        for (first, *rest), points in shown.items():
            style: dict[str, Any] = {"color": colours[first], "linestyle": dashes[tuple(rest)]}
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, **style)
        titled(axes, "bytes of the buffer", "bus bandwidth")
        axes.yaxis.set_major_formatter(lambda value, _: scaled(value, "B/s"))
        axes.xaxis.set_major_formatter(lambda value, _: scaled(value, "B"))
        key(axes, list(colours.items()), narrow, -0.2)

    best = sorted(
        ((max(rate for _, rate in points), " ".join(label)) for label, points in curves.items()), reverse=True
    )
    words = "best bandwidth: " + ", ".join(f"{name} {scaled(rate, 'B/s')}" for rate, name in best[:6]) + "."
    data = rows_csv(
        (*(told or ["operation"]), "bytes", "bytes_per_second"),
        [(*label, *point) for label, points in curves.items() for point in points],
    )
    lines = [f"{name}: {', '.join(rest)}" for name, rest in zip(DASH_NAMES, dashes, strict=False) if rest]
    caption = f"{'; '.join(lines).capitalize()}. " if lines else ""
    title = "Collectives by size" if "operation" in told else "All-reduce by size and route"
    rows_of_key = ceil(len(colours) / 2)
    return figure(
        "collectives", title, words, draw, data, f"{caption}Medians of the repeats.", 290.0 + 14.0 * rows_of_key
    )


def _value(field: str, value: object) -> str:
    """A field's value as a curve's name says it."""
    return f"{value} ranks" if field == "ranks" else {"lo": "loopback"}.get(str(value), str(value)).replace("_", " ")
