"""What a run left behind in its folder, read once into arrays; torch-free and tolerant of a killed writer."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tozan.errors import Problem, UserError

Array = NDArray[np.float64]
Record = dict[str, Any]

STEP_FIELDS = (
    "step",
    "tokens",
    "loss",
    "grad_norm",
    "lr",
    "seconds",
    "tokens_per_second",
    "model_flops_per_second",
    "mfu",
    "hfu",
)
EVAL_FIELDS = ("step", "loss", "perplexity", "bits_per_byte")
PHASES = (
    "data",
    "forward",
    "backward",
    "communication",
    "bubble",
    "optimizer",
    "checks",
    "evaluation",
    "checkpoint",
    "copy",
    "other",
)


@dataclass(frozen=True)
class Event:
    """Something that happened between two steps.

    Attributes:
        step: optimizer step at which it happened.
        event: its kind, such as `checkpoint`, `resumed` or `skipped step`.
        text: what a reader should know about it.
    """

    step: int
    event: str
    text: str


@dataclass(frozen=True)
class History:
    """A run's files as arrays and tables.

    Attributes:
        folder: the run folder.
        steps: one array per field of a step record (`STEP_FIELDS`), each of length N, in order of step.
        phases: seconds of each phase of each step, each array of length N; phases never recorded are absent.
        evals: one array per field of an evaluation (`EVAL_FIELDS`) plus `trained`, the tokens trained on by then.
        events: what happened, in order of time.
        facts: `run.json`: parameters, shape, machine, versions, peak.
        config: `config.toml` as nested tables.
        origins: where each `table.key` of the config came from, where that is known.
        manifest: the data set's `manifest.json`, or empty when it is not there any more.
        sample: text written by the model, or empty.
    """

    folder: Path
    steps: dict[str, Array]
    phases: dict[str, Array]
    evals: dict[str, Array]
    events: list[Event]
    facts: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)
    sample: str = ""

    @property
    def tokens(self) -> int:
        """Tokens trained on, counted once however often a step was repeated."""
        return int(self.steps["tokens"][-1]) if self.steps["tokens"].size else 0


def records(path: Path) -> Iterator[Record]:
    """The records of a `metrics.jsonl`; a line cut short by a crash is passed over."""
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                yield record


def merge(lines: Iterable[Record]) -> tuple[list[Record], list[Record], list[Event]]:
    """Steps, evaluations and events of a run that may have been killed and resumed.

    A resumed run repeats the steps after its checkpoint: the last record of a step counts, and on a `resumed` event
    the records beyond its step, which the new life has not reached yet, are dropped.
    """
    kept: dict[str, dict[int, Record]] = {"step": {}, "eval": {}}
    events: dict[tuple[int, str, str], None] = {}
    for record in lines:
        kind, step = record.get("kind"), record["step"]
        if kind in kept:
            kept[kind][step] = record
        elif kind == "event":
            if record.get("event") == "resumed":
                kept = {name: {at: old for at, old in by.items() if at <= step} for name, by in kept.items()}
            events[step, str(record.get("event", "")), str(record.get("text", ""))] = None
    steps, evals = ([by[at] for at in sorted(by)] for by in kept.values())
    told = {at for at, name, _ in events if name == "skipped step"}
    for record in steps:
        if record.get("skipped") and record["step"] not in told:
            events[record["step"], "skipped step", str(record["skipped"])] = None
    return steps, evals, [Event(*key) for key in events]


def read(folder: Path) -> History:
    """Read a run folder.

    Args:
        folder: a folder written by `tozan train`.

    Raises:
        UserError: the folder has no `metrics.jsonl`, or nothing in it.
    """
    path = folder / "metrics.jsonl"
    if not path.is_file():
        fix = "give the folder that `tozan train` wrote (`run.folder` in its config)"
        raise UserError(Problem(str(folder), "no metrics.jsonl here, so this is not a run folder", fix))
    steps, evals, events = merge(records(path))
    if not steps and not evals:
        raise UserError(Problem(str(path), "holds no complete record yet", "wait for the first step to end"))
    config, origins = _config(folder / "config.toml")
    facts = _json(folder / "run.json")
    stated = facts.get("origins")
    table = _columns(steps, STEP_FIELDS)
    evaluations = _columns(evals, EVAL_FIELDS)
    evaluations["trained"] = np.interp(
        evaluations["step"], np.append(0.0, table["step"]), np.append(0.0, table["tokens"])
    )
    sample = folder / "sample.txt"
    return History(
        folder=folder,
        steps=table,
        phases=_phases(steps),
        evals=evaluations,
        events=events,
        facts=facts,
        config=config,
        origins=origins | (stated if isinstance(stated, dict) else {}),
        manifest=_manifest(folder, facts, config),
        sample=sample.read_text(encoding="utf-8", errors="replace") if sample.is_file() else "",
    )


def _columns(rows: list[Record], names: Iterable[str]) -> dict[str, Array]:
    return {name: np.array([_number(row.get(name)) for row in rows], dtype=np.float64) for name in names}


def _phases(rows: list[Record]) -> dict[str, Array]:
    seen = [row.get("phases") or {} for row in rows]
    names = [name for name in PHASES if any(name in phases for phases in seen)]
    names += sorted({name for phases in seen for name in phases} - set(PHASES))
    return {name: np.array([_number(phases.get(name, 0.0)) for phases in seen]) for name in names}


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _config(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The tables of a `config.toml`, and the origins it states as comments behind the values."""
    try:
        text = path.read_text(encoding="utf-8")
        config = tomllib.loads(text)
    except (OSError, ValueError):
        return {}, {}
    origins, table = {}, ""
    for line in text.splitlines():
        code, _, comment = line.partition("  # ")
        if code.startswith("["):
            table = code.strip().strip("[]") + "."
        elif "=" in code and comment:
            origins[table + code.partition("=")[0].strip()] = comment.strip()
    return config, origins


def _manifest(folder: Path, facts: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """The manifest of the data set, where the run found it or, if the run folder has moved, near it."""
    written = config.get("data", {}).get("path")
    places = [Path(path) for path in (facts.get("data"), written) if isinstance(path, str)]
    places += [folder / path for path in places]
    return next((found for path in places if (found := _json(path / "manifest.json"))), {})


def thin(x: Array, y: Array, most: int = 800) -> tuple[Array, Array]:
    """At most `most` points that draw the same curve: both ends, and the lowest and highest of each bucket between.

    Args:
        x: positions (N,), rising.
        y: values (N,); points that are not finite are dropped.
        most: largest number of points returned.

    Returns:
        Positions and values, each (≤ most,).
    """
    finite = np.isfinite(x) & np.isfinite(y)
    x, y = x[finite], y[finite]
    if x.size <= most:
        return x, y
    edges = np.linspace(1, x.size - 1, most // 2).astype(int)
    keep = {0, x.size - 1}
    for first, last in pairwise(edges):
        keep |= {first + int(np.argmin(y[first:last])), first + int(np.argmax(y[first:last]))}
    index = np.array(sorted(keep))
    return x[index], y[index]


def smooth(y: Array, share: float = 0.02) -> Array:
    """Exponential moving average of a noisy curve, without the start-up bias.

    Args:
        y: values (N,); values that are not finite are passed over.
        share: time constant as a share of N (at least 1 step).
    """
    decay = 1.0 - 1.0 / max(1.0, share * y.size)
    result, total, weight = np.empty_like(y), 0.0, 0.0
    for index, value in enumerate(y.tolist()):
        if np.isfinite(value):
            total, weight = decay * total + value, decay * weight + 1.0
        result[index] = total / weight if weight else np.nan
    return result
