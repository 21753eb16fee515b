"""What figures share: colours by name, the colour of each phase, plain axes, names at the ends of curves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.colors import to_rgba
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from tozan.report.drawing import STAND_IN

INK, MUTED, LINE, BLUE, AMBER, RED = (STAND_IN[name] for name in ("ink", "muted", "line", "blue", "amber", "red"))
TEAL, GREEN, VIOLET, ROSE, SAND, GREY = (STAND_IN[name] for name in ("teal", "green", "violet", "rose", "sand", "grey"))
SERIES = (BLUE, AMBER, TEAL, VIOLET, ROSE, GREEN, SAND, GREY, RED)
"""Colours for things that have none of their own, in the order in which they are told apart best."""


def plain(axes: Axes, x: str, y: str) -> None:
    """Few round ticks, thousands separated, the unit of y above the axis where it needs no turned head."""
    titled(axes, x, y)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(count))
    if axes.get_yscale() == "linear":
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        if "rate" not in y:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axes.margins(x=0.01)


def label_ends(axes: Axes, x: float, names: list[tuple[str, float, str]]) -> None:
    """Names at the right ends of curves instead of a legend, kept apart when the curves meet."""
    low, high = axes.get_ylim()
    apart = 0.09 * (high - low)
    ordered = sorted(names, key=lambda entry: entry[1])
    places = [value for _, value, _ in ordered]
    for index in range(1, len(places)):
        places[index] = max(places[index], places[index - 1] + apart)
    for (name, _, colour), place in zip(ordered, places, strict=True):
        axes.annotate(
            name,
            (x, place),
            xytext=(6, 0),
            textcoords="offset points",
            color=colour,
            va="center",
            annotation_clip=False,
        )


def count(value: float, _: object = None) -> str:
    """A count on an axis: `800`, `120 k`, `1.3 B`."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if abs(value) >= size:
            return f"{value / size:.4g} {letter}"
    return f"{value / 1e3:.4g} k" if abs(value) >= 1e5 else f"{value:,.0f}"


PHASE_COLOURS = {
    "data": GREEN,
    "forward": BLUE,
    "backward": TEAL,
    "communication": SAND,
    "bubble": GREY,
    "optimizer": VIOLET,
    "evaluation": ROSE,
    "checkpoint": RED,
    "copy": RED,
    "checks": ROSE,
    "other": LINE,
}


def phase_colour(phase: str, others: Sequence[str] = ()) -> str:
    """A phase's colour, the same in every figure; what has none takes one by its place among `others`."""
    if phase.startswith("wait"):
        return AMBER if phase in ("wait/dp", "wait") else SAND if "tp" in phase else ROSE
    return PHASE_COLOURS.get(phase) or SERIES[list(others).index(phase) % len(SERIES) if phase in others else -1]


def bare(axes: Axes) -> None:
    """No lines and no ticks but the names at the left."""
    axes.grid(False)
    axes.xaxis.set_visible(False)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.tick_params(axis="y", labelcolor=INK)


class Cell(NamedTuple):
    """A filled rectangle; its paper shows through, so that shades work on light and dark pages."""

    left: float
    bottom: float
    width: float
    height: float
    colour: str
    alpha: float


def cells(axes: Axes, filled: Sequence[Cell]) -> None:
    """Draw rectangles, all at once: one by one, a few hundred take seconds."""
    patches = [Rectangle((cell.left, cell.bottom), cell.width, cell.height) for cell in filled]
    colours = [to_rgba(cell.colour, cell.alpha) for cell in filled]
    axes.add_collection(PatchCollection(patches, facecolors=colours, edgecolors="none", linewidths=0))


def key(axes: Axes, names: Iterable[tuple[str, str]], narrow: bool, below: float = -0.04) -> None:
    """Names of filled colours, in rows under the drawing; as many in a row as have room."""
    names = list(names)
    longest = max(len(name) for name, _ in names) + 4
    columns = max(1, min(2 if narrow else 4, (44 if narrow else 84) // longest))
    handles = [Rectangle((0, 0), 1, 1, facecolor=colour, edgecolor="none") for _, colour in names]
    axes.legend(
        handles, [name for name, _ in names], loc="upper left", bbox_to_anchor=(-0.01, below), frameon=False,
        ncols=columns, fontsize=9.5, handlelength=0.9, handleheight=0.9, columnspacing=1.2, labelcolor=INK,
        borderaxespad=0.0,
    )  # fmt: skip


class _FewPowers(LogLocator):
    """Powers of ten, and their doubles and fivefolds where the axis spans no more than two of them."""

    def __init__(self) -> None:
        super().__init__(base=10.0, numticks=6)

    def tick_values(self, vmin: float, vmax: float) -> Any:
        """The places of the ticks between two values."""
        self.set_params(subs=(1.0, 2.0, 5.0) if vmax < 100 * vmin else (1.0,))
        return super().tick_values(vmin, vmax)


def powers(axes: Axes, which: str = "both") -> None:
    """Logarithmic axes with a few round ticks."""
    for name, axis in (("x", axes.xaxis), ("y", axes.yaxis)):
        if which in ("both", name):
            (axes.set_xscale if name == "x" else axes.set_yscale)("log")
            axis.set_major_locator(_FewPowers())
            axis.set_minor_locator(NullLocator())
            axis.set_minor_formatter(NullFormatter())


def titled(axes: Axes, x: str, y: str) -> None:
    """The unit of y above the axis, that of x at its right end."""
    axes.set_title(y, loc="left", fontsize=10.5, color=MUTED, pad=8)
    axes.set_xlabel(x, fontsize=10.5, loc="right")
