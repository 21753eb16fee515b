"""From a matplotlib drawing to a figure of a page: SVG, wide and narrow, with its words and its data as CSV.

Matplotlib draws with stand-in colours that become CSS variables, so that one drawing serves light and dark pages.
In a notebook a figure shows itself.
"""

from __future__ import annotations

import csv
import html
import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from tozan.report.history import Array

COLOURS = {
    "ink": ("#1d2126", "#e6e8ea"),
    "muted": ("#646c75", "#9ba4ae"),
    "line": ("#dfe2e5", "#31373e"),
    "blue": ("#1f5f9f", "#7db3ea"),
    "amber": ("#b8540c", "#f0a35e"),
    "red": ("#b3261e", "#f2857c"),
    "teal": ("#1a7f86", "#6cc5cb"),
    "green": ("#3a7d44", "#86c98f"),
    "violet": ("#6a4fa3", "#b9a3ea"),
    "rose": ("#b04a78", "#ec9dc1"),
    "sand": ("#a07d1c", "#d8bd63"),
    "grey": ("#a3a9b0", "#6d757e"),
}
"""Light and dark value of each colour of a figure and of the page."""

STAND_IN = {name: f"#0a0b{index:02x}" for index, name in enumerate(COLOURS)}
WIDTHS = {"wide": 570.0, "narrow": 350.0}
MOST_ROWS = 20_000
FONT = "system-ui, -apple-system, 'Segoe UI', 'Noto Sans', 'DejaVu Sans', sans-serif"

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 11.0,
    "font.family": "DejaVu Sans",
    "text.color": STAND_IN["ink"],
    "axes.edgecolor": STAND_IN["line"],
    "axes.labelcolor": STAND_IN["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": STAND_IN["line"],
    "grid.linewidth": 0.8,
    "xtick.color": STAND_IN["line"],
    "ytick.color": STAND_IN["line"],
    "xtick.labelcolor": STAND_IN["muted"],
    "ytick.labelcolor": STAND_IN["muted"],
    "ytick.major.size": 0.0,
    "lines.linewidth": 1.7,
    "lines.solid_joinstyle": "round",
    "path.simplify": True,
}


@dataclass(frozen=True)
class Figure:
    """One figure, ready to be put on a page, saved as a file or shown in a notebook.

    Attributes:
        name: file name without ending, and the prefix of ids inside the SVG.
        title: what is drawn.
        description: what it shows, in words, for readers who do not see it.
        svg: one drawing per width in `WIDTHS`, coloured by CSS variables.
        csv: the data behind it.
        caption: a remark under the drawing.
    """

    name: str
    title: str
    description: str
    svg: dict[str, str] = field(repr=False)
    csv: str = field(repr=False)
    caption: str = ""

    def standalone(self) -> str:
        """The wide drawing as a file of its own: it brings its colours, light and dark."""
        light, dark = ("".join(f"--{name}:{pair[mode]};" for name, pair in COLOURS.items()) for mode in (0, 1))
        style = f"<style>svg{{{light}}}@media(prefers-color-scheme:dark){{svg{{{dark}}}}}</style>"
        return re.sub(r"(<svg[^>]*>)", rf"\1{style}", self.svg["wide"], count=1)

    def _repr_svg_(self) -> str:
        return self.standalone()

    def _repr_html_(self) -> str:
        caption = f"<figcaption>{html.escape(self.caption)}</figcaption>" if self.caption else ""
        return f"<figure><h4>{html.escape(self.title)}</h4>{self.standalone()}{caption}</figure>"


Draw = Callable[[Axes, bool], None]


def figure(
    name: str, title: str, description: str, draw: Draw, data: str, caption: str = "", height: float = 262.0
) -> Figure:
    """Draw and describe a figure; the arguments are those of `Figure` and `render`."""
    return Figure(name, title, description, render(name, title, description, draw, height), data, caption)


def render(name: str, title: str, description: str, draw: Draw, height: float = 262.0) -> dict[str, str]:
    """Draw a figure at each width.

    Args:
        name: prefix of the ids inside the SVG, so that several drawings live on one page.
        title: the SVG's `<title>`.
        description: the SVG's `<desc>`.
        draw: draws into the axes it is given; its second argument says whether there is little room.
        height: of the drawing, in points; a narrow one is a little higher.

    Returns:
        `{"wide": svg, "narrow": svg}`.
    """
    drawings = {}
    for width, across in WIDTHS.items():
        size = across, height + (8.0 if width == "narrow" else 0.0)
        with matplotlib.rc_context(STYLE | {"svg.hashsalt": f"{name}-{width}"}):
            canvas = Canvas(figsize=(size[0] / 72, size[1] / 72), layout="constrained")
            axes = canvas.add_subplot()
            draw(axes, width == "narrow")
            file = io.StringIO()
            canvas.savefig(
                file,
                format="svg",
                transparent=True,
                metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
            )
        drawings[width] = _accessible(file.getvalue(), f"{name}-{width}", size, title, description)
    return drawings


def _accessible(svg: str, name: str, size: tuple[float, float], title: str, description: str) -> str:
    """Matplotlib's file as an inline element: colours as variables, the page's font, words for a screen reader."""
    body = svg[svg.index('<g id="figure') :]
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    body = re.sub(r" font-family: [^;\"]*;?", "", body).replace("xlink:href", "href")
    for colour, stand_in in STAND_IN.items():
        body = body.replace(stand_in, f"var(--{colour})")
    body = re.sub(r"\n\s*", "\n", body)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="{name.rpartition("-")[2]}" '
        f'viewBox="0 0 {size[0]:g} {size[1]:g}" style="font-family: {FONT}; stroke-linejoin: round" '
        f'role="img" aria-labelledby="{name}-title {name}-desc">'
    )
    words = (
        f'<title id="{name}-title">{html.escape(title)}</title><desc id="{name}-desc">{html.escape(description)}</desc>'
    )
    return head + words + body.strip()


def rows_csv(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Rows of any values as CSV; what is not known is left empty."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(["" if value is None else value for value in row] for row in rows)
    return file.getvalue()


def table(columns: dict[str, Array]) -> str:
    """Columns as CSV; beyond `MOST_ROWS` rows every n-th is kept."""
    length = max((column.size for column in columns.values()), default=0)
    stride = -(-length // MOST_ROWS) or 1
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    for row in zip(*(column[::stride].tolist() for column in columns.values()), strict=True):
        writer.writerow("" if math.isnan(value) else f"{value:.10g}" for value in row)
    return file.getvalue()
