"""The page of a training run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from tozan import planner
from tozan.amounts import duration, percent, scaled
from tozan.bench.result import Peak
from tozan.config import load
from tozan.errors import UserError
from tozan.models.arithmetic import Shape, hardware_flops, model_flops
from tozan.planner.machine import Machine
from tozan.planner.machine import load as load_machine
from tozan.report import advice, history, ranks, words
from tozan.report.drawing import Figure
from tozan.report.figures import pipeline, plans, run, scaling, steps
from tozan.report.history import History
from tozan.report.page import Page, Table
from tozan.report.ranks import Ranks, Slow, Timeline

PEAKS = ("measured", "nominal")


def page(folder: Path, sample: str | None = None, machine: str | None = None) -> Page:
    """The page of a run.

    Args:
        folder: the run's.
        sample: text written by the model. Default: the run folder's `sample.txt`, if it is there.
        machine: a machine or its file, to price the run with. Default: the run folder's `machine.toml`, if there.

    Raises:
        UserError: the folder is not a run folder, or holds no record yet; there is no such machine.
    """
    found = history.read(folder)
    who = everyone(found)
    slow = ranks.slow(who, stages(found)) if who else []
    priced, detail = machine_of(folder, machine), ranks.timeline(folder, found.facts.get("processes"))
    peak = peak_of(found, priced)
    return Page(
        kind="tozan training run",
        title=_title(found),
        when=_when(found.facts.get("started")),
        tiles=[*words.tiles(found), *_memory(detail)],
        summary=words.summary(found),
        advice=advice.of_run(found, who, slow),
        figures=all_figures(found, who, slow, priced, detail),
        sample=found.sample if sample is None else sample,
        wide=[flops_table(found, peak)],
        facts=[model_table(found), data_table(found), speed_table(found, peak), machine_table(found)],
        events=[event for event in found.events if event.event != "checkpoint"] + advice.slow_events(found, slow),
        config=config_tables(found),
        foot=_foot(found),
    )


def everyone(found: History) -> Ranks | None:
    """The breakdown of a run's ranks since it was last resumed."""
    resumed = max((event.step for event in found.events if event.event == "resumed"), default=0)
    size = found.facts.get("processes")
    return ranks.read(found.folder, resumed, size) or ranks.read(found.folder, 0, size)


def stages(found: History) -> int:
    """Pipeline stages of a run."""
    return int((found.facts.get("layout") or {}).get("pipeline", 1))


def _memory(detail: Timeline | None) -> list[words.Tile]:
    """The most memory that a rank has held, where it was written down."""
    held = {rank: one["memory"] for rank, one in detail.ranks.items() if "memory" in one} if detail else {}
    if not held:
        return []
    fullest = max(held, key=lambda rank: held[rank])
    return [words.Tile("Memory", plans.size(held[fullest]), f"at most, rank {fullest}")]


def all_figures(
    found: History, who: Ranks | None, slow: list[Slow], machine: Machine | None, timeline: Timeline | None
) -> list[Figure]:
    """Every figure that the run has data for, in the order of the page."""
    forecast = predicted(found, machine) if machine else None
    metrics = {figure.name: figure for figure in run.of_run(found)}
    made = [metrics.pop("loss", None), metrics.pop("throughput", None), steps.phases(found, who)]
    if forecast:
        made.append(steps.beside(_measured(found, who), forecast.phases, forecast.low, forecast.high))
        made.append(
            plans.memory(forecast.memory, machine.device.memory if machine else None, "the fullest rank, predicted")
        )
    made += [steps.heat_map(who, slow), pipeline.of_run(found, timeline), steps.transfers(who), *metrics.values()]
    return [one for one in made if one is not None]


def _measured(found: History, who: Ranks | None) -> dict[str, float]:
    """Seconds of a step by phase, without evaluation and checkpoints."""
    means: Mapping[str, float] = {name: float(values.mean()) for name, values in found.phases.items() if values.size}
    if who is not None:
        means = who.means
    return {name: value for name, value in means.items() if name not in ("evaluation", "checkpoint", "copy")}


def machine_of(folder: Path, named: str | None) -> Machine | None:
    """The machine to price a run with: the one named, or the run folder's own file.

    Raises:
        UserError: there is no machine of that name.
    """
    own = folder / "machine.toml"
    return load_machine(named) if named else load_machine(str(own)) if own.is_file() else None


def predicted(found: History, machine: Machine) -> planner.Prediction | None:
    """The planner's forecast of the run's step; None where its config can no longer be read."""
    try:
        return planner.predict(load(found.folder / "config.toml").config, machine)
    except UserError:
        return None


def peak_of(found: History, machine: Machine | None) -> Peak | None:
    """The peaks of one process: measured at the start of the run, nominal by its processor, else by a data sheet.

    A machine file written by `tozan bench calibrate` holds measured rates, and says nothing about nominal ones.
    """
    processes, precision = int(found.facts.get("processes", 1)), found.facts.get("precision")
    measured, nominal = (found.facts.get(f"peak_{which}_flops") for which in ("measured", "nominal"))
    how = str(found.facts.get("peak_nominal_how") or "")
    if not measured:
        return None
    if not nominal and machine and not machine.trainer and precision in machine.device.peak:
        nominal, how = machine.device.peak[precision] * processes, machine.name
    return Peak(measured=measured / processes, nominal=nominal and nominal / processes, how=how)


def flops_table(found: History, peak: Peak | None) -> Table:
    """The run as a line of the talk's FLOP/s table."""
    processes = int(found.facts.get("processes", 1))
    layout = found.facts.get("layout") or {}
    flops = words.middle(found.steps["model_flops_per_second"])
    point = scaling.Point(
        processes,
        int(layout.get("data", 1)),
        processes // max(1, int(layout.get("data", 1))),
        words.middle(found.steps["seconds"]),
        0.0,
        0.0,
        words.middle(found.steps["tokens_per_second"]),
        flops,
        None,
        {},
        peak,
    )
    return Table("FLOP/s", scaling.talk_table([point]), scaling.talk_note(peak), scaling.TALK_HEAD)


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
    rows += [(label, value_text(sizes[key])) for key, label in labels.items() if key in sizes]
    try:
        shape = Shape(**sizes)
    except TypeError:
        return Table("Model", rows)
    per_token = model_flops(shape) / shape.sequence
    rows.append(("FLOPs per token", scaled(per_token, "FLOP")))
    rows.append(("FLOPs of the run", scaled(per_token * found.tokens, "FLOP")))
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
            size = scaled(amount.get("bytes", 0), "B")
            rows.append((f"{title}: {name}", f"{amount.get('documents', 0):,} documents, {size}"))
    if "corpus_sha256" in manifest:
        rows.append(("corpus SHA-256", f"{manifest['corpus_sha256'][:12]}…"))
    path = found.config.get("data", {}).get("path", "")
    return Table("Data", rows, f"Data set: {path}" if rows and path else "")


def speed_table(found: History, each: Peak | None = None) -> Table:
    """Achieved FLOP/s and MFU with formula, precision and both terms.

    Args:
        found: the run.
        each: peaks of one of its processes.
    """
    steps, facts = found.steps, found.facts
    if not steps["step"].size:
        return Table("Speed", [])
    peak = float(facts.get("peak_measured_flops") or float("nan"))
    rows = [
        ("tokens/s, median step", f"{words.middle(steps['tokens_per_second']):,.0f}"),
        ("model FLOP/s, median step", scaled(words.middle(steps["model_flops_per_second"]), "FLOP/s")),
        ("peak, measured in this run", scaled(peak, "FLOP/s")),
        ("MFU = model FLOP/s ÷ measured peak", percent(words.middle(steps["mfu"]))),
        ("precision", words.PRECISIONS.get(facts.get("precision", ""), "—")),
        *_hardware(found, peak),
        *_nominal(found, each),
        ("time in steps", duration(float(steps["seconds"][steps["seconds"] > 0].sum()))),
    ]
    how = [f"{which.capitalize()} peak: {facts[key]}." for which in PEAKS if facts.get(key := f"peak_{which}_how")]
    return Table("Speed", rows, " ".join(how))


def machine_table(found: History) -> Table:
    """The machine and the versions of what ran on it."""
    machine, versions = found.facts.get("machine") or {}, found.facts.get("versions") or {}
    rows = []
    for key, value in machine.items():
        if key == "memory_bytes" and isinstance(value, int | float):
            rows.append(("memory", f"{value / 2**30:.1f} GiB"))
        elif words.plain(value):
            rows.append((key.replace("_", " "), value_text(value)))
    rows += [(name, str(version)) for name, version in versions.items()]
    return Table("Machine and versions", rows)


def config_tables(found: History) -> list[Table]:
    """The config as one table per TOML table, each value with its origin where that is known."""
    scalars = {key: value for key, value in found.config.items() if not isinstance(value, dict)}
    tables = {"": scalars} | {key: value for key, value in found.config.items() if isinstance(value, dict)}
    made = []
    for title, values in tables.items():
        prefix = f"{title}." if title else ""
        rows = [
            (key, value_text(value), _origin(found.origins.get(f"{prefix}{key}", ""))) for key, value in values.items()
        ]
        if rows:
            made.append(Table(f"[{title}]" if title else "the file", rows))
    return made


def _hardware(found: History, peak: float) -> list[tuple[str, ...]]:
    """What was executed, recomputation included."""
    hfu = words.middle(found.steps["hfu"])
    if not hfu > 0:
        return []
    return [
        ("hardware FLOP/s, recomputation included", scaled(hfu * peak, "FLOP/s")),
        ("HFU", percent(hfu)),
    ]


def _nominal(found: History, each: Peak | None) -> list[tuple[str, ...]]:
    """The nominal peak of all processes, and the share of it."""
    if each is None or not each.nominal:
        return []
    nominal = each.nominal * int(found.facts.get("processes", 1))
    share = words.middle(found.steps["model_flops_per_second"]) / nominal
    return [("peak, nominal", scaled(nominal, "FLOP/s")), ("model FLOP/s ÷ nominal peak", percent(share))]


def _origin(origin: str) -> str:
    """A file's origin by its name and line; the folder would fill the page."""
    return origin.rpartition("/")[2] if re.search(r"\.toml:\d+$", origin) else origin


def value_text(value: object) -> str:
    """A value of a config or a description as people read it."""
    if value is None:
        return "—"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(value_text, value)) or "none"
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


def _foot(found: History) -> str:
    said = "Loss is cross-entropy in nats per token."
    if found.facts.get("flops_formula"):
        said += f" FLOPs of a step: {found.facts['flops_formula']}."
    try:
        shape = Shape(**(found.facts.get("shape") or {}))
    except TypeError:
        return said
    again = hardware_flops(shape, found.config.get("train", {}).get("recompute", "none")) / model_flops(shape)
    return f"{said} Hardware FLOPs are {again:.3g} × the model's, for what is recomputed."
