"""What a plan says: memory by category, where ranks sit on a torus, time over nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator

from tozan.amounts import percent, seconds
from tozan.report.drawing import Figure, figure, rows_csv
from tozan.report.history import Array
from tozan.report.marks import BLUE, GREY, MUTED, SERIES, bare, key
from tozan.report.words import time_tick


def memory(parts: Mapping[str, float], available: float | None = None, what: str = "the fullest rank") -> Figure | None:
    """Bytes by category, one bar each, beside what a device has.

    Args:
        parts: bytes by category.
        available: bytes that a rank may use.
        what: whose memory it is.
    """
    held = {name: float(value) for name, value in parts.items() if value > 0}
    if not held:
        return None
    total = sum(held.values())

    def draw(axes: Axes, narrow: bool) -> None:
        for place, (_, value) in enumerate(held.items()):
            axes.barh(place, value, height=0.62, color=BLUE)
            axes.annotate(
                f"{size(value)}  ({percent(value / total)})", (value, place), xytext=(5, 0), va="center",
                textcoords="offset points", fontsize=10,
            )  # fmt: skip
        axes.set_yticks(range(len(held)), list(held))
        axes.invert_yaxis()
        bare(axes)
        axes.set_xlim(0, max(held.values()) * (1.9 if narrow else 1.35))

    words = f"{size(total)} on {what}: " + ", ".join(f"{name} {size(value)}" for name, value in held.items()) + "."
    if available:
        words += f" That is {percent(total / available)} of {size(available)}."
    caption = f"Together {size(total)}" + (f" of {size(available)}." if available else ".")
    height = 40.0 + 28.0 * len(held)
    return figure(
        "memory",
        "Memory by category",
        words,
        draw,
        rows_csv(("category", "bytes"), list(held.items())),
        caption,
        height,
    )


def size(value: float) -> str:
    """Bytes in the unit that suits them."""
    for unit, step in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= step:
            return f"{value / step:.3g} {unit}"
    return f"{value:.0f} B"


def layouts(found: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Figure | None:
    """The best layouts' time of a step with their 80% intervals."""
    if not found:
        return None
    values = [
        (float(one["seconds"]), float(one.get("low") or one["seconds"]), float(one.get("high") or one["seconds"]))
        for one in found
    ]

    def draw(axes: Axes, narrow: bool) -> None:
        far = max(high for _, _, high in values)
        for place, (middle, low, high) in enumerate(values):
            axes.plot([low, high], [place + 0.16] * 2, color=GREY, linewidth=5, solid_capstyle="butt")
            axes.plot([middle], [place + 0.16], "o", color=BLUE, markersize=7)
            axes.annotate(
                seconds(middle),
                (high, place + 0.16),
                xytext=(7, 0),
                textcoords="offset points",
                va="center",
                fontsize=9.5,
            )
            text = names[place] if not narrow or len(names[place]) < 52 else names[place][:50] + "…"
            axes.annotate(text, (0, place - 0.2), fontsize=9.5, va="center", color=MUTED)
        axes.set_xlim(0, far * 1.18)
        axes.set_ylim(len(values) - 0.4, -0.55)
        bare(axes)
        axes.yaxis.set_visible(False)

    best = values[0]
    between = f"between {seconds(best[1])} and {seconds(best[2])} in 8 cases of 10"
    words = f"Best: {names[0]}, {seconds(best[0])} a step, {between}."
    data = rows_csv(
        ("layout", "seconds", "low", "high"), [(name, *value) for name, value in zip(names, values, strict=True)]
    )
    height = 30.0 + 44.0 * len(values)
    return figure(
        "layouts", "Best layouts", words, draw, data, "Dot: predicted seconds of a step. Bar: 80% interval.", height
    )


def breakdown(found: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Figure | None:
    """Where the best layouts' predicted steps go: one stacked bar each."""
    if not found or not found[0].get("breakdown"):
        return None
    longest = max(float(one["seconds"]) for one in found)
    parts = [
        part
        for part in found[0]["breakdown"]
        if any(float(one["breakdown"].get(part, 0.0)) > 0.005 * longest for one in found)
    ]
    colours = dict(zip(parts, SERIES, strict=False))
    parts = list(colours)

    def draw(axes: Axes, narrow: bool) -> None:
        for place, one in enumerate(found):
            left = 0.0
            for part in parts:
                value = max(0.0, float(one["breakdown"].get(part, 0.0)))
                axes.barh(place + 0.16, value, left=left, height=0.42, color=colours[part])
                left += value
            text = names[place] if not narrow or len(names[place]) < 52 else names[place][:50] + "…"
            axes.annotate(text, (0, place - 0.24), fontsize=9.5, va="center", color=MUTED)
        axes.set_ylim(len(found) - 0.45, -0.55)
        bare(axes)
        axes.yaxis.set_visible(False)
        key(axes, [(part, colours[part]) for part in parts], narrow)

    best = found[0]
    shares = ", ".join(f"{part} {percent(float(best['breakdown'][part]) / float(best['seconds']))}" for part in parts)
    rows = [
        (name, *(one["breakdown"].get(part, 0.0) for part in parts)) for name, one in zip(names, found, strict=True)
    ]
    height = 60.0 + 44.0 * len(found) + 14.0 * (len(parts) // 4)
    words = f"The best layout's step: {shares}."
    return figure(
        "plan-breakdown",
        "Where a step's time goes, predicted",
        words,
        draw,
        rows_csv(("layout", *parts), rows),
        "",
        height,
    )


def curves(rows: Sequence[Mapping[str, float]], kind: str) -> Figure | None:
    """Time of a step over nodes as the planner prices it, beside the ideal."""
    if len(rows) < 2:
        return None
    x = np.array([float(row["nodes"]) for row in rows])
    y = np.array([float(row["seconds"]) for row in rows])
    ideal = y[0] * (x[0] / x if kind == "strong" else np.ones_like(x))

    def draw(axes: Axes, narrow: bool) -> None:
        axes.set_xscale("log", base=2)
        axes.plot(x, ideal, color=GREY, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.plot(x, y, color=BLUE, marker="o", markersize=4)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.locator_params(axis="x", numticks=5)
        _time_axis(axes, np.append(y, ideal))
        axes.set_title("time of a step", loc="left", fontsize=10.5, color=MUTED, pad=8)
        axes.set_xlabel("nodes", fontsize=10.5, loc="right")
        key(axes, [("predicted", BLUE), ("ideal", GREY)], narrow, -0.17)

    words = (
        f"From {x[0]:,.0f} to {x[-1]:,.0f} nodes a step goes from {seconds(y[0])} to {seconds(y[-1])}: "
        f"{percent(float(ideal[-1] / y[-1]))} of ideal."
    )
    names = list(rows[0])
    data = rows_csv(names, [[row.get(name) for name in names] for row in rows])
    title = "Strong scaling, predicted" if kind == "strong" else "Weak scaling, predicted"
    return figure(f"{kind}-curve", title, words, draw, data, "The best layout for each number of nodes.", 280.0)


def _time_axis(axes: Axes, values: Array) -> None:
    """Seconds upwards: from nought where they hardly differ, else by logarithm, with labels three times a decade."""
    if values.max() > 3 * values.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_formatter(lambda *_: "")
    else:
        axes.set_ylim(0, 1.2 * values.max())
    axes.yaxis.set_major_formatter(time_tick)
