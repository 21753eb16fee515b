"""From a file and flags to a complete `Config`, every value with its origin; all mistakes at once."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tozan.config import batch, place, presets, sources, wording
from tozan.config.check import broken, places
from tozan.config.fields import fields, show, tables, toml_string
from tozan.config.schema import Config
from tozan.config.sources import Source, Written
from tozan.errors import Problem, UserError


@dataclass(frozen=True)
class Loaded:
    """A complete config and where its values come from.

    Attributes:
        config: every value set: preset applied, batch sizes solved for.
        origin: for each `table.key`: `default`, `preset gpt2-124m`, `run.toml:12`, `--optim.lr`, or `solved: ...`.
        warnings: what may be a mistake but does not keep the run from starting.
    """

    config: Config
    origin: Mapping[str, str]
    warnings: tuple[Problem, ...] = ()

    def toml(self) -> str:
        """The complete config as TOML, origins as comments; loads again to the same `Config`."""
        rows = ["# Every value of a run, with where it came from.", f"version = {self.config.version}"]
        for table in tables():
            rows += ["", f"[{table}]"]
            for name, value in getattr(self.config, table):
                if value is not None:  # TOML has no null: what is left out takes the same default again
                    origin = re.sub(r"[\x00-\x1f\x7f]", " ", self.origin[f"{table}.{name}"])
                    rows.append(f"{name} = {_toml_value(value)}  # {origin}")
        return "\n".join(rows) + "\n"

    def require_ready(self, world_size: int | None = None) -> None:
        """Check that the run can start here (see `place.py`).

        Args:
            world_size: processes of this run; None: the environment's WORLD_SIZE, or 1.

        Raises:
            UserError: it cannot; all reasons at once.
        """
        found = place.problems(self.config, self.origin, world_size=world_size)
        if found:
            raise UserError(*found)


def load(path: Path | str | None, flags: Sequence[str] | Mapping[str, Any] = (), *, to_run: bool = False) -> Loaded:
    """Read a config. What counts, from least to most: default, preset, file, flag.

    Args:
        path: the TOML file; None: flags alone.
        flags: `["--optim.lr", "1e-3", "--train.steps=50"]`, or `{"optim.lr": 1e-3}`.
        to_run: also check that the run can start here: data, run folder, processes, installed packages.

    Raises:
        UserError: all mistakes at once, in the order of the file, flags last.
    """
    file = None if path is None else Path(path)
    written, flagged = Source() if file is None else sources.read_file(file), sources.read_flags(flags)
    found = written.problems + flagged.problems
    # A file that could not be read at all says nothing about what is missing in it.
    unread = file is not None and bool(written.problems) and not written.values and not written.headers
    values = _with_preset({**written.values, **flagged.values})
    if file is None:
        values.setdefault("version", Written(1, "default"))
    tree, refused = _accept(values)
    found += [wording.refused(fields()[key], values[key]) for key in refused if key in values]
    # A mistyped key is answered once: what it stands for is not called missing as well.
    absent = [key for key in refused if key not in values and key not in written.guessed | flagged.guessed]
    if not unread:
        origin_file = None if file is None else str(file)
        found += [wording.missing(fields()[k], origin_file, written.headers.get(fields()[k].table)) for k in absent]
    wrong = _in_doubt(refused, values)
    config = Config.model_validate(tree)
    origin = {key: values[key].origin if key in values else "default" for key in fields()}
    found += broken(config, origin, warnings=False, wrong=wrong)
    config, solved, contradiction = _solve_batch(config, origin, wrong)
    found += contradiction
    origin |= solved
    if to_run:
        found += place.problems(config, origin, wrong)
    if found:
        raise UserError(*_in_order(found, file))
    warnings = _preset_warnings(written, flagged) + broken(config, origin, warnings=True)
    return Loaded(config, origin, tuple(warnings))


def _with_preset(values: dict[str, Written]) -> dict[str, Written]:
    """Add what the preset says, wherever nobody says otherwise; an unknown preset adds nothing."""
    name = values["model.preset"].value if "model.preset" in values else None
    if not isinstance(name, str) or name not in presets.names():
        return values
    given = {f"model.{key}": Written(value, f"preset {name}") for key, value in presets.preset(name).items()}
    return given | values


def _accept(values: Mapping[str, Written]) -> tuple[dict[str, Any], list[str]]:
    """The values as nested tables with stand-ins for what is refused or missing, and the keys of those."""
    tree: dict[str, Any] = {table: {} for table in tables()}
    for key, written in values.items():
        spec = fields()[key]
        (tree[spec.table] if spec.table else tree)[spec.name] = written.value
    refused: list[str] = []
    try:
        Config.model_validate(tree)
    except ValidationError as error:
        refused = list(dict.fromkeys(_key_of(entry["loc"]) for entry in error.errors()))
    preset = tree["model"].get("preset")
    if isinstance(preset, str) and preset not in presets.names() and "model.preset" not in refused:
        refused.append("model.preset")
    for key in refused:
        spec = fields()[key]
        inner = tree[spec.table] if spec.table else tree
        inner.pop(spec.name, None)
        if spec.required:
            inner[spec.name] = spec.example
    return tree, refused


def _key_of(location: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in location[:2]) if location[0] != "version" else "version"


def _in_doubt(refused: list[str], values: Mapping[str, Written]) -> set[str]:
    """Keys whose values say nothing: those refused, and all sizes that an unknown preset would have given."""
    wrong = set(refused)
    if "model.preset" in refused:
        wrong |= {key for key in fields() if key.startswith("model.") and key not in values}
    return wrong


def _solve_batch(
    config: Config, origin: Mapping[str, str], wrong: set[str]
) -> tuple[Config, dict[str, str], list[Problem]]:
    """The config with all three batch sizes, and how they were found; or the contradiction."""
    names = ("micro_batch", "accumulate", "global_batch")
    keys = [f"train.{name}" for name in names] + ["layout.data"]
    if wrong & {*keys, "model.sequence"}:
        return config, {}, []
    try:
        solution = batch.solve(
            config.train.micro_batch,
            config.train.accumulate,
            config.train.global_batch,
            config.layout.data,
            config.model.sequence,
        )
    except batch.ContradictionError as error:
        return config, {}, [Problem(places(origin, keys), str(error), error.fix)]
    limit = int(fields()["train.global_batch"].high or 0)
    if solution.global_batch > limit:
        what = f"train.global_batch would be {solution.global_batch:,}; the limit is {limit:,}"
        return config, {}, [Problem(places(origin, keys), what, "write a smaller micro_batch or accumulate")]
    train = config.train.model_copy(update={name: getattr(solution, name) for name in names})
    how = {f"train.{name}": text for name, text in solution.how.items()}
    return config.model_copy(update={"train": train}), how, []


def _preset_warnings(written: Source, flagged: Source) -> list[Problem]:
    """A preset given as a flag does not replace sizes that the file spells out; that may surprise."""
    if "model.preset" not in flagged.values:
        return []
    name = flagged.values["model.preset"].value
    return [
        Problem(entry.origin, f"{key} {show(entry.value)} stays, beside --model.preset {name}", "delete the line")
        for key, entry in written.values.items()
        if key in {f"model.{size}" for size in presets.preset(name)} and key not in flagged.values
    ]


def _in_order(found: list[Problem], file: Path | None) -> list[Problem]:
    """By line of the file, then the rest as found."""

    def line(problem: Problem) -> int:
        place = re.match(rf"{re.escape(str(file))}:(\d+)", problem.where)
        return int(place[1]) if place else 0 if problem.where == str(file) else 1 << 30

    return sorted(dict.fromkeys(found), key=line)


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return toml_string(value)
    if isinstance(value, list):
        return f"[{', '.join(_toml_value(item) for item in value)}]"
    return repr(value)
