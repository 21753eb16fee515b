"""A page: one self-contained HTML file with words, figures and tables; opens offline, without script."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

import tozan
from tozan.report.drawing import COLOURS, Figure, rows_csv
from tozan.report.history import Event
from tozan.report.words import Tile

PAGE_COLOURS = {"paper": ("#fcfcfa", "#15181b"), "raised": ("#f5f5f1", "#1b1f23")}
MOST_EVENTS = 60


@dataclass(frozen=True)
class Table:
    """A table of the page: rows of a name, a value and, for a config, where the value came from.

    Attributes:
        title: above it.
        rows: cells as text.
        note: under it.
        head: names of the columns; with them the table is as wide as the page and comes as CSV, too.
    """

    title: str
    rows: Sequence[tuple[str, ...]]
    note: str = ""
    head: tuple[str, ...] = ()


@dataclass(frozen=True)
class Page:
    """What a page says, top to bottom.

    Attributes:
        kind: what it is about, over the title.
        title: its name.
        when: when that was.
        tiles: headline numbers.
        summary: sentences.
        advice: sentences that say what to do next.
        figures: in order.
        sample: text written by the model.
        wide: tables with heads.
        facts: tables of names and values.
        events: what happened.
        config: the config's tables.
        foot: conventions, at the very end.
    """

    kind: str
    title: str
    when: str = ""
    tiles: Sequence[Tile] = ()
    summary: Sequence[str] = ()
    advice: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    sample: str = ""
    wide: Sequence[Table] = ()
    facts: Sequence[Table] = ()
    events: Sequence[Event] = ()
    config: Sequence[Table] = field(default=())
    foot: str = ""

    def html(self) -> str:
        """The whole file."""
        environment = jinja2.Environment(
            loader=jinja2.FunctionLoader(_template), autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined
        )
        environment.filters["code"] = _code
        light, dark = (_variables(mode) for mode in (0, 1))
        style = jinja2.Environment(autoescape=False).from_string(_template("style.css")).render(light=light)
        return environment.get_template("page.html.j2").render(
            version=tozan.__version__,
            page=self,
            light=Markup(light),
            dark=Markup(dark),
            style=Markup(style),
            figures=[_on_page(figure) for figure in self.figures],
            wide=[(table, _link("text/csv", rows_csv(table.head, table.rows))) for table in self.wide if table.rows],
            facts=[table for table in self.facts if table.rows],
            events=self.events[:MOST_EVENTS],
            more_events=max(0, len(self.events) - MOST_EVENTS),
        )

    def write(self, target: Path) -> Path:
        """Write the file, whole or not at all; returns its path."""
        target.parent.mkdir(parents=True, exist_ok=True)
        staged = target.with_name(target.name + ".partial")
        staged.write_text(self.html(), encoding="utf-8")
        staged.replace(target)
        return target


def _on_page(figure: Figure) -> dict[str, Any]:
    return {
        "name": figure.name,
        "title": figure.title,
        "caption": figure.caption,
        "svg": figure.svg,
        "svg_link": _link("image/svg+xml", figure.standalone()),
        "csv_link": _link("text/csv", figure.csv),
    }


def _code(text: str) -> Markup:
    """Text with what stands between backticks as code."""
    pieces = [html.escape(piece) for piece in text.split("`")]
    return Markup("".join(f"<code>{piece}</code>" if i % 2 else piece for i, piece in enumerate(pieces)))


def _link(kind: str, text: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(text.encode()).decode()}"


def _variables(mode: int) -> str:
    return " ".join(f"--{name}: {pair[mode]};" for name, pair in (COLOURS | PAGE_COLOURS).items())


def _template(name: str) -> str:
    return (resources.files("tozan.report") / "templates" / name).read_text(encoding="utf-8")
