"""Whether matrix products of bf16 run on AMX tiles here: `gemm_tiles.cpp`, if it is right and faster than PyTorch.

That is found out once for each cache of kernels, when the library has been compiled: a process of its own (`trial`),
which may crash without harm, compares it with fp64 and times it beside PyTorch's libraries. What it found is kept
beside the library, so all processes with that cache decide alike. Ranks with caches of their own agree at the start of
a run (`train.machine`), since the bits of replicas must be the same.
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
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tozan.cpuinfo import cpuinfo, flags
from tozan.ops import native

SOURCE = Path(__file__).with_name("gemm_tiles.cpp")
UNITS = {"amx_tile", "amx_bf16"}
"""Flags of a processor that has what is needed, as /proc/cpuinfo names them."""
ADVANTAGE = 1.03
"""By how much the kernel must be faster than PyTorch's libraries: less is chance."""
PATIENCE = 120.0
"""Seconds that a trial may take; it needs about five."""

_allowed = True


@dataclass(frozen=True)
class Verdict:
    """What a trial has found.

    Attributes:
        use: whether the kernel is to be used.
        why: for people.
        failed: whether it is not used for another reason than its speed.
        steps: of 32 elements along k that the kernel does at once.
        stream: whether it writes large results past the caches.
    """

    use: bool
    why: str
    failed: bool = False
    steps: int = 12
    stream: bool = True


def allow(choice: bool) -> None:
    """Use the kernel where it pays, as at the start, or not at all, because other ranks cannot."""
    global _allowed
    _allowed = choice


def library() -> ctypes.CDLL | None:
    """The compiled products, if they are to be used."""
    return _found()[0] if _allowed else None


def verdict() -> Verdict | None:
    """Why they are used or not; None where the processor has no such tiles."""
    found = _found()[1]
    if found and found.use and not _allowed:
        return Verdict(False, "other ranks of this run do not use AMX tiles", failed=True)
    return found


@functools.cache
def _found() -> tuple[ctypes.CDLL | None, Verdict | None]:
    if not _units() >= UNITS:
        return None, None
    library, why = native.open_library(SOURCE)
    if library is None:
        return None, Verdict(False, why, failed=True)
    if not hasattr(library, "gemm_tiles_permitted"):
        return None, Verdict(False, "the compiler knows no AMX (GCC 11 and clang 12 do)", failed=True)
    try:
        found = decide(Path(library._name))
    except OSError as error:
        return None, Verdict(False, str(error), failed=True)
    if not found.use:
        return None, found
    if not library.gemm_tiles_permitted():  # asked of Linux by every process, though the trial has got it
        return None, Verdict(False, "Linux lets this process use no AMX tiles", failed=True)
    library.gemm_tiles_tune(ctypes.c_long(found.steps), ctypes.c_int(found.stream))
    return library, found


def _units() -> set[str]:
    """The first processor's flags."""
    return flags(cpuinfo())


def decide(path: Path) -> Verdict:
    """What was found about a library; tries it, if nobody has yet.

    Of the processes of a node that ask together one tries, and the others wait. Without the file it is tried again.

    Args:
        path: of the library; the verdict is kept beside it, one for each version of PyTorch.

    Raises:
        OSError: the folder cannot be written to.
    """
    file = path.with_name(f"{path.stem}.torch-{torch.__version__}.json")
    with contextlib.nullcontext() if file.exists() else native.turn(file.with_suffix(f".{platform.node()}.lock"), file):
        if found := _read(file):
            return found
        found = _try(path)
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


def _try(path: Path) -> Verdict:
    """Runs the trial in a process of its own, on as many threads as this one has."""
    command = [sys.executable, "-m", "tozan.ops.trial", str(path), str(torch.get_num_threads())]
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
        trial: `wrong`, what is wrong with the results, or else `seconds`: of PyTorch (`torch`) and of the kernel by
            how it was set, [steps, stream], each a list by direction.
        threads: that it ran on.
    """
    if trial["wrong"]:
        return Verdict(False, str(trial["wrong"]), failed=True)
    theirs = trial["torch"]
    (steps, stream), ours = min(trial["tiles"], key=lambda one: sum(one[1]))
    gain = sum(theirs) / sum(ours)
    by = ", ".join(f"{name} {t / o:.2f}" for name, t, o in zip(trial["directions"], theirs, ours, strict=True))
    why = f"{gain:.2f} times PyTorch's rate ({by}; {threads} thread{'s' if threads > 1 else ''})"
    return Verdict(gain >= ADVANTAGE, why, False, int(steps), bool(stream))
