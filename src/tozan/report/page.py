"""The page of a run: one self-contained HTML file made from the files in the run's folder."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

import tozan
from tozan.models.arithmetic import Shape, model_flops
from tozan.report import figures, history, words
from tozan.report.drawing import COLOURS, Figure
from tozan.report.history import History

PAGE_COLOURS = {"paper": ("#fcfcfa", "#15181b"), "raised": ("#f5f5f1", "#1b1f23")}
MOST_EVENTS = 60


@dataclass(frozen=True)
class Table:
    """A table of the page: rows of a name, a value and, for a config, where the value came from."""

    title: str
    rows: Sequence[tuple[str, ...]]
    note: str = ""


def write(run: Path, out: Path | None = None, sample: str | None = None) -> Path:
    """Write the page of a run.

    Args:
        run: a run folder.
        out: the file to write. Default: `report.html` in the run folder.
        sample: text written by the model. Default: the run folder's `sample.txt`, if it is there.

    Returns:
        The file written.

    Raises:
        UserError: the folder is not a run folder, or holds no record yet.
    """
    found = history.read(run)
    page = render(found, found.sample if sample is None else sample)
    target = out or run / "report.html"
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = target.with_name(target.name + ".partial")
    staged.write_text(page, encoding="utf-8")
    staged.replace(target)
    return target


def render(found: History, sample: str = "") -> str:
    """The page of a run as HTML."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_template), autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined
    )
    light, dark = (_variables(mode) for mode in (0, 1))
    style = jinja2.Environment(autoescape=False).from_string(_template("style.css")).render(light=light)
    return environment.get_template("run.html.j2").render(
        version=tozan.__version__,
        title=_title(found),
        started=_when(found.facts.get("started")),
        light=Markup(light),
        dark=Markup(dark),
        style=Markup(style),
        tiles=words.tiles(found),
        summary=words.summary(found),
        figures=[_on_page(figure) for figure in figures.of_run(found)],
        sample=sample,
        tables=[
            table
            for table in (model_table(found), data_table(found), speed_table(found), machine_table(found))
            if table.rows
        ],
        events=[event for event in found.events if event.event != "checkpoint"][:MOST_EVENTS],
        more_events=max(0, sum(event.event != "checkpoint" for event in found.events) - MOST_EVENTS),
        config=config_tables(found),
        formula=f"FLOPs of a step: {found.facts['flops_formula']}." if found.facts.get("flops_formula") else "",
    )


def model_table(found: History) -> Table:
    """Sizes, parameters and FLOPs of the model."""
    sizes = found.facts.get("shape") or {}
    rows: list[tuple[str, ...]] = []
    if found.facts.get("parameters"):
        rows.append(("parameters", f"{found.facts['parameters']:,}"))
    labels = {
        "family": "family", "layers": "layers", "width": "width", "heads": "query heads", "kv_heads": "key/value heads",
        "mlp_width": "MLP width", "vocabulary": "vocabulary", "sequence": "sequence", "tied": "tied output head",
    }  # fmt: skip
    rows += [(label, _value(sizes[key])) for key, label in labels.items() if key in sizes]
    try:
        shape = Shape(**sizes)
    except TypeError:
        return Table("Model", rows)
    per_token = model_flops(shape) / shape.sequence
    rows.append(("FLOPs per token", words.scaled(per_token, "FLOP")))
    rows.append(("FLOPs of the run", words.scaled(per_token * found.tokens, "FLOP")))
    return Table("Model", rows, "Forward and backward (3 × forward), without what is recomputed.")


def data_table(found: History) -> Table:
    """Documents, tokens, sources and licences of the data set, and how much of it was read."""
    manifest = found.manifest
    rows: list[tuple[str, ...]] = []
    for split, amount in (manifest.get("splits") or {}).items():
        name = "held out" if split == "validation" else split
        rows.append((f"documents, {name}", f"{amount.get('documents', 0):,}"))
        rows.append((f"tokens, {name}", f"{amount.get('tokens', 0):,}"))
        if split == "train" and amount.get("tokens"):
            rows.append(("epochs read", f"{found.tokens / amount['tokens']:.3g}"))
    for title, key in (("source", "sources"), ("licence", "licences")):
        for name, amount in (manifest.get(key) or {}).items():
            size = words.scaled(amount.get("bytes", 0), "B")
            rows.append((f"{title}: {name}", f"{amount.get('documents', 0):,} documents, {size}"))
    if "corpus_sha256" in manifest:
        rows.append(("corpus SHA-256", f"{manifest['corpus_sha256'][:12]}…"))
    path = found.config.get("data", {}).get("path", "")
    return Table("Data", rows, f"Data set: {path}" if rows and path else "")


def speed_table(found: History) -> Table:
    """Achieved FLOP/s and MFU with formula, precision and both terms."""
    steps, facts = found.steps, found.facts
    if not steps["step"].size:
        return Table("Speed", [])
    peak = float(facts.get("peak_measured_flops") or float("nan"))
    rows = [
        ("tokens/s, median step", f"{words.middle(steps['tokens_per_second']):,.0f}"),
        ("model FLOP/s, median step", words.scaled(words.middle(steps["model_flops_per_second"]), "FLOP/s")),
        ("peak, measured in this run", words.scaled(peak, "FLOP/s")),
        ("MFU = model FLOP/s ÷ measured peak", words.percent(words.middle(steps["mfu"]))),
        ("precision", words.PRECISIONS.get(facts.get("precision", ""), "—")),
        ("time in steps", words.duration(float(steps["seconds"][steps["seconds"] > 0].sum()))),
    ]
    how = facts.get("peak_measured_how")
    return Table("Speed", rows, f"Peak: {how}." if how else "")


def machine_table(found: History) -> Table:
    """The machine and the versions of what ran on it."""
    machine, versions = found.facts.get("machine") or {}, found.facts.get("versions") or {}
    rows = []
    for key, value in machine.items():
        if key == "memory_bytes" and isinstance(value, int | float):
            rows.append(("memory", f"{value / 2**30:.1f} GiB"))
        elif _plain(value):
            rows.append((key.replace("_", " "), _value(value)))
    rows += [(name, str(version)) for name, version in versions.items()]
    return Table("Machine and versions", rows)


def config_tables(found: History) -> list[Table]:
    """The config as one table per TOML table, each value with its origin where that is known."""
    scalars = {key: value for key, value in found.config.items() if not isinstance(value, dict)}
    tables = {"": scalars} | {key: value for key, value in found.config.items() if isinstance(value, dict)}
    made = []
    for title, values in tables.items():
        prefix = f"{title}." if title else ""
        rows = [(key, _value(value), _origin(found.origins.get(f"{prefix}{key}", ""))) for key, value in values.items()]
        if rows:
            made.append(Table(f"[{title}]" if title else "the file", rows))
    return made


def _plain(value: object) -> bool:
    return isinstance(value, str | int | float)


def _origin(origin: str) -> str:
    """A file's origin by its name and line; the folder would fill the page."""
    return origin.rpartition("/")[2] if re.search(r"\.toml:\d+$", origin) else origin


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _title(found: History) -> str:
    """The run folder as the config names it, without `runs/`; its own name where that is a whole path."""
    named = Path(found.config.get("run", {}).get("folder", found.folder))
    if named.is_absolute() or ".." in named.parts or named.name != found.folder.resolve().name:
        return found.folder.resolve().name
    return "/".join(named.parts[1:] if len(named.parts) > 1 and named.parts[0] == "runs" else named.parts)


def _when(started: object) -> str:
    if not isinstance(started, str):
        return ""
    return started[:16].replace("T", " ")


def _on_page(figure: Figure) -> dict[str, Any]:
    return {
        "name": figure.name,
        "title": figure.title,
        "caption": figure.caption,
        "svg": figure.svg,
        "svg_link": _link("image/svg+xml", figure.standalone()),
        "csv_link": _link("text/csv", figure.csv),
    }


def _link(kind: str, text: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(text.encode()).decode()}"


def _variables(mode: int) -> str:
    return " ".join(f"--{name}: {pair[mode]};" for name, pair in (COLOURS | PAGE_COLOURS).items())


def _template(name: str) -> str:
    return (resources.files("tozan.report") / "templates" / name).read_text(encoding="utf-8")
