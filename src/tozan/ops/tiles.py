"""Whether matrix products and attention in bf16 run on AMX tiles here: where a kernel is right and faster than PyTorch.

That is found out once for each cache of kernels, when a library has been compiled: a process of its own (`trial`,
`trial_attention`), which may crash without harm, compares it with fp64 and times it beside what would be used without
it. What it found is kept beside the library, so all processes with that cache decide alike. Ranks with caches of their
own agree at the start of a run (`train.machine`), since the bits of replicas must be the same.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from tozan.cpuinfo import cpuinfo, flags
from tozan.ops import native

Task = Literal["products", "attention"]
TASKS: tuple[Task, ...] = get_args(Task)
SOURCES: Mapping[Task, Path] = {
    "products": Path(__file__).with_name("gemm_tiles.cpp"),
    "attention": Path(__file__).with_name("attention_tiles.cpp"),
}
_TRIALS: Mapping[Task, str] = {"products": "tozan.ops.trial", "attention": "tozan.ops.trial_attention"}
UNITS = {"amx_tile", "amx_bf16"}
"""Flags of a processor that has what is needed, as /proc/cpuinfo names them."""
ADVANTAGE = 1.03
"""By how much the kernel must be faster than PyTorch's libraries: less is chance."""
PATIENCE = 120.0
"""Seconds that a trial may take; it needs two to five."""

_allowed: frozenset[Task] = frozenset(TASKS)


@dataclass(frozen=True)
class Verdict:
    """What a trial has found.

    Attributes:
        use: whether the kernel is to be used.
        why: for people.
        failed: whether it is not used for another reason than its speed.
        steps: of 32 elements along k that the products' kernel does at once.
        stream: whether that writes large results past the caches.
    """

    use: bool
    why: str
    failed: bool = False
    steps: int = 12
    stream: bool = True


def allow(tasks: Collection[Task]) -> None:
    """Use kernels for these where they pay, as for all at the start; for others not at all: other ranks cannot."""
    global _allowed
    _allowed = frozenset(tasks)


def library(task: Task) -> ctypes.CDLL | None:
    """The compiled kernels, if they are to be used."""
    return _found(task)[0] if task in _allowed else None


def verdict(task: Task) -> Verdict | None:
    """Why they are used or not; None where the processor has no such tiles."""
    found = _found(task)[1]
    if found and found.use and task not in _allowed:
        return Verdict(False, "other ranks of this run do not use AMX tiles", failed=True)
    return found


def status(task: Task, dtype: torch.dtype | None, on_vectors: Callable[[], bool], others: str) -> str:
    """Who does something in `dtype` on this processor, and why.

    Args:
        task: what.
        dtype: None: it is done elsewhere.
        on_vectors: whether there is a kernel on AVX-512; asked only where there are no tiles.
        others: who does what has no kernel.
    """
    if native.status() != native.COMPILED:
        return native.status()
    found = verdict(task) if dtype == torch.bfloat16 else None
    if found and found.use:
        return f"bf16 by tozan on AMX tiles: {found.why}; others by {others}"
    if dtype and on_vectors():
        return f"fp32 and bf16 by tozan on AVX-512, others by {others}"
    return f"{others}; tozan's on AMX tiles: {found.why}" if found else others


def trouble(task: Task) -> str:
    """Why something goes without a kernel that should serve here, for a warning; empty if all is well."""
    found = verdict(task) if native.usable() else None
    return f"{task} on AMX tiles: not used, {found.why}" if found and found.failed else ""


@functools.cache
def _found(task: Task) -> tuple[ctypes.CDLL | None, Verdict | None]:
    if not _units() >= UNITS:
        return None, None
    library, why = native.open_library(SOURCES[task])
    if library is None:
        return None, Verdict(False, why, failed=True)
    if not hasattr(library, "tiles_permitted"):
        return None, Verdict(False, "the compiler knows no AMX (GCC 11 and clang 12 do)", failed=True)
    try:
        found = decide(Path(library._name), task)
    except OSError as error:
        return None, Verdict(False, str(error), failed=True)
    if not found.use:
        return None, found
    if not library.tiles_permitted():  # asked of Linux by every process, though the trial has got it
        return None, Verdict(False, "Linux lets this process use no AMX tiles", failed=True)
    if task == "products":
        library.gemm_tiles_tune(ctypes.c_long(found.steps), ctypes.c_int(found.stream))
    return library, found


def _units() -> set[str]:
    """The first processor's flags."""
    return flags(cpuinfo())


def decide(path: Path, task: Task) -> Verdict:
    """What was found about a library; tries it, if nobody has yet.

    Of the processes of a node that ask together one tries, and the others wait. Without the file it is tried again.

    Args:
        path: of the library; the verdict is kept beside it, one for each version of PyTorch.
        task: what it is for.

    Raises:
        OSError: the folder cannot be written to.
    """
    file = path.with_name(f"{path.stem}.torch-{torch.__version__}.json")
    with contextlib.nullcontext() if file.exists() else native.turn(file.with_suffix(f".{platform.node()}.lock"), file):
        if found := _read(file):
            return found
        found = _try(path, task)
        made = file.with_suffix(f".{platform.node()}.{os.getpid()}")
        made.write_text(json.dumps(dataclasses.asdict(found), indent=1), encoding="utf-8")
        made.replace(file)
    return found


def _read(file: Path) -> Verdict | None:
    """A verdict from its file; None if there is none that can be read."""
    try:
        return Verdict(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _try(path: Path, task: Task) -> Verdict:
    """Runs the trial in a process of its own, on as many threads as this one has."""
    command = [sys.executable, "-m", _TRIALS[task], str(path), str(torch.get_num_threads())]
    places = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False, env=environment)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Verdict(False, f"its trial did not end: {error}", failed=True)
    if done.returncode < 0:
        return Verdict(False, f"its trial died of {signal.Signals(-done.returncode).name}", failed=True)
    said = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not said:
        return Verdict(False, f"its trial failed: {(done.stderr.strip().splitlines() or ['no word'])[-1]}", failed=True)
    return judge(json.loads(said[-1]), torch.get_num_threads())


def judge(trial: Mapping[str, Any], threads: int) -> Verdict:
    """A verdict from what a trial says.

    Args:
        trial: `wrong`, what is wrong with the results, or else `directions` and, each a list by these, seconds: of
            what is used without the kernel (`torch`, in words `rival`), and of the kernel by how it was set (`tiles`):
            [steps, stream], or null if there is nothing to set.
        threads: that it ran on.
    """
    if trial["wrong"]:
        return Verdict(False, str(trial["wrong"]), failed=True)
    theirs = trial["torch"]
    setting, ours = min(trial["tiles"], key=lambda one: sum(one[1]))
    gain = sum(theirs) / sum(ours)
    by = ", ".join(f"{name} {t / o:.2f}" for name, t, o in zip(trial["directions"], theirs, ours, strict=True))
    why = f"{gain:.2f} times {trial['rival']} ({by}; {threads} thread{'s' if threads > 1 else ''})"
    return Verdict(gain >= ADVANTAGE, why, False, *(setting or ()))
