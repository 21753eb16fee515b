"""Whether a run can start here: processes, data, run folder, and what must be installed. Looked at before torch loads.

A run folder that already holds checkpoints is continued, so what the checkpoints depend on must not change: every
size in `[model]`, `data.seed` and `train.seed`. Everything else may (steps, learning rate, batch, precision, ...):
the run goes on with the new values. `data.path` may change too, since data sets move; the trainer still compares the
tokenizers.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import tomllib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from tozan.config.check import SIZES, has_gpu, places, processes
from tozan.config.schema import Config
from tozan.errors import Problem
from tozan.models import arithmetic

Origin = Mapping[str, str]

WORLD_SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PJM_MPI_PROC", "SLURM_STEP_NUM_TASKS")
"""Where torchrun, mpirun, Fugaku's PJM and srun write the number of processes."""


def problems(
    config: Config, origin: Origin, wrong: Collection[str] = (), world_size: int | None = None
) -> list[Problem]:
    """What keeps the run from starting here, leaving out what reads a key in `wrong`.

    Args:
        config: a config whose fields are each valid, but for those in `wrong`.
        origin: where each value comes from.
        wrong: keys already known to be wrong.
        world_size: processes of this run; None: what the launcher left in the environment, or 1.
    """
    found: list[Problem] = []
    if not {f"layout.{name}" for name in SIZES} & set(wrong):
        found += _processes(config, origin, world_size)
    if "data.path" not in wrong:
        found += _data(config, origin, wrong)
    if "run.folder" not in wrong:
        found += _run_folder(config, origin, wrong)
    return found + [problem for problem in _installed(config, origin) if problem.where not in wrong]


def _processes(config: Config, origin: Origin, world_size: int | None) -> Iterator[Problem]:
    if world_size is None:
        name = next((name for name in WORLD_SIZES if name in os.environ), "WORLD_SIZE")
        text = os.environ.get(name, "1")
        if not text.isdecimal() or int(text) < 1:
            yield Problem(f"environment {name}", f"is {text!r}, but must be a whole number from 1", f"unset {name}")
            return
        world_size = int(text)
    if config.layout.processes != world_size:
        yield processes(config, world_size, origin)


def _data(config: Config, origin: Origin, wrong: Collection[str]) -> Iterator[Problem]:
    where, path = places(origin, ["data.path"]), Path(config.data.path)
    build = f"write it with `tozan data build SOURCES --out {path}`, or set data.path to a folder that it wrote"
    if not path.exists():
        yield Problem(where, f'data.path "{path}": there is no such folder', build)
        return
    if not path.is_dir():
        yield Problem(where, f'data.path "{path}" is a file, but data is a folder', build)
        return
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
    except FileNotFoundError:
        yield Problem(where, f'data.path "{path}" holds no manifest.json, so it is no finished data set', build)
        return
    except OSError as error:
        yield Problem(where, f'data.path "{path}": manifest.json cannot be read: {error.strerror}', build)
        return
    except (ValueError, RecursionError):
        manifest = None
    if not isinstance(manifest, dict) or manifest.get("format") != "tozan-data":
        yield Problem(where, f'data.path "{path}": manifest.json is not the manifest of a tozan data set', build)
        return
    yield from _fits(config, origin, manifest, wrong)


def _fits(config: Config, origin: Origin, manifest: dict[str, Any], wrong: Collection[str]) -> Iterator[Problem]:
    """The data's ids fit the embedding, and it holds at least one sample."""
    ids, rows = manifest.get("vocabulary"), config.model.vocabulary
    if isinstance(ids, int) and rows is not None and rows < ids and "model.vocabulary" not in wrong:
        what = f"model.vocabulary {rows} is less than the {ids} tokens of the tokenizer in {config.data.path}"
        yield Problem(places(origin, ["model.vocabulary"]), what, f"write vocabulary = {-(-ids // 64) * 64}")
    splits = manifest.get("splits")
    train = splits.get("train") if isinstance(splits, dict) else None
    tokens = train.get("tokens") if isinstance(train, dict) else None
    if isinstance(tokens, int) and tokens <= config.model.sequence and "model.sequence" not in wrong:
        what = f"model.sequence {config.model.sequence} needs {config.model.sequence + 1} tokens for one sample"
        fix = "write a smaller sequence, or build a larger data set"
        yield Problem(places(origin, ["model.sequence"]), f"{what}; {config.data.path} has {tokens} to train on", fix)


def _run_folder(config: Config, origin: Origin, wrong: Collection[str]) -> Iterator[Problem]:
    where, folder = places(origin, ["run.folder"]), Path(config.run.folder)
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        yield Problem(where, f'run.folder "{folder}": {existing} is a file', "name a folder, such as runs/first")
    elif not os.access(existing, os.W_OK | os.X_OK):
        what = f'run.folder "{folder}": no permission to write in {existing}'
        yield Problem(where, what, "name a folder that you may write in, such as runs/first")
    elif any(folder.glob("checkpoints/step-*")) and (folder / "config.toml").is_file():
        changed = _changed(config, folder / "config.toml", wrong)
        if changed:
            what = f'run.folder "{folder}" holds a run with other values: {"; ".join(changed)}'
            fix = "name a new run.folder for a new run, or restore these values to continue the old one"
            yield Problem(where, what, fix)


def _changed(config: Config, file: Path, wrong: Collection[str]) -> list[str]:
    """What differs, among what must not, between a config and that of the run it would continue."""
    try:
        old = Config.model_validate(tomllib.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError):
        return [f"its {file.name} cannot be read"]
    pairs: dict[str, tuple[Any, Any]] = {}
    if not any(key.startswith("model.") for key in wrong):
        then, now = (dataclasses.asdict(arithmetic.resolve(c.model, tokenizer_size=64)) for c in (old, config))
        if None in (old.model.vocabulary, config.model.vocabulary):
            now["vocabulary"] = then["vocabulary"]  # the tokenizer sets one of them: the trainer compares
        pairs = {f"model.{name}": (then[name], now[name]) for name in then}
    pairs["data.seed"] = (old.data.seed, config.data.seed)
    pairs["train.seed"] = (old.train.seed, config.train.seed)
    return [f"{key} {then}, here {now}" for key, (then, now) in pairs.items() if then != now and key not in wrong]


def _installed(config: Config, origin: Origin) -> Iterator[Problem]:
    """Packages, compilers and devices that the config asks for."""
    for key, asked in (("tensorboard", config.metrics.tensorboard), ("wandb", config.metrics.wandb)):
        if asked and importlib.util.find_spec(key) is None:
            what = f"metrics.{key} needs the package {key}, which is not installed"
            yield Problem(places(origin, [f"metrics.{key}"]), what, f"pip install 'tozan[{key}]', or leave {key} out")
    compilers = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    if config.train.compile and not any(name and shutil.which(name.split()[0]) for name in compilers):
        what = "train.compile needs a C++ compiler; neither $CXX nor c++, g++ or clang++ is there"
        yield Problem(places(origin, ["train.compile"]), what, "install g++, or write compile = false")
    if config.train.device == "cuda" and not has_gpu():
        what = 'train.device "cuda" needs a GPU, and this machine shows none'
        yield Problem(places(origin, ["train.device"]), what, 'write device = "cpu" or "auto"')
