"""The script of faults: which, where and when, from a seed alone; and the marks that say which have happened."""

from __future__ import annotations

import os
import random
import struct
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

KINDS: dict[str, int] = {
    "kill": 22,
    "kill from outside": 9,
    "kill in a save": 9,
    "kill in a copy": 5,
    "kill in a restart": 5,
    "terminate": 6,
    "stop": 6,
    "pause": 4,
    "slow rank": 4,
    "no space": 4,
    "device error": 4,
    "read-only folder": 3,
    "vanished folder": 3,
    "truncated checkpoint": 3,
    "flipped checkpoint bit": 3,
    "damaged checkpoint, memory lost": 1,
    "damaged shard": 2,
    "nan gradient": 4,
    "inf gradient": 4,
    "flipped weight bit": 3,
    "flipped optimizer bit": 3,
    "flipped gradient bit": 2,
    "dropped connection": 5,
}
"""Kinds of faults and how often each comes, relative to the others."""
NETWORK: dict[str, int] = {
    "half-open": 2,
    "cable out": 2,
    "agents' connection reset": 4,
    "rank's connections reset": 6,
    "cable out for a moment": 4,
    "half-open for a moment": 4,
    "slow link": 4,
    "lossy link": 4,
}
"""Further kinds where the run has several hosts."""

OUTSIDE = {
    *("kill from outside", "pause", "vanished folder", "truncated checkpoint", "flipped checkpoint bit"),
    *("damaged checkpoint, memory lost", "damaged shard"),
    *NETWORK,
}
"""Kinds that are done to a rank or its files from another process."""
GRADIENTS = {"nan gradient", "inf gradient", "flipped gradient bit"}
MEMORY_BITS = {"flipped weight bit", "flipped optimizer bit"}
REDONE = GRADIENTS | MEMORY_BITS
"""Kinds after which the step is taken once more, without a restart."""
HARMLESS = {
    "pause",
    "slow rank",
    "cable out for a moment",
    "half-open for a moment",
    "slow link",
    "lossy link",
} | REDONE
"""Kinds after which nothing needs to be restarted."""
MEMORY_LOST = {"damaged checkpoint, memory lost"}
"""Kinds that stand for the loss of a node and all its memory: these may cost more than one step."""
NODE_LOST = {"cable out", "half-open"}
"""Kinds after which a node is given up, and its neighbour's copies are used: these may cost more than one step too."""
TWICE = {"kill in a restart"}
"""Kinds that kill twice, a step in a run and then its restart, and may cost a step each time."""
DISK = {"no space", "read-only folder"}
"""Kinds that are done to a disk, if the checkpoints have one of their own; else a rank's calls fail."""
_AT_SAVES = {"kill in a save", "device error"} | DISK
_PHASES = ("data", "forward", "backward", "optimizer")


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        number: its place in the script, from 0.
        kind: one of `KINDS`.
        step: it is armed when this step begins.
        rank: who is hit.
        point: where in the step: a phase that has just ended, `collective`, `file` (a call that changes a file),
            `copy`, `restart`, `step`, or `outside`.
        count: at the how many-th arrival there.
        delay: seconds between that and the fault.
        chance: a number in [0, 1) for whatever else is to be chosen.
    """

    number: int
    kind: str
    step: int
    rank: int
    point: str
    count: int
    delay: float
    chance: float

    def words(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def write(
    seed: int, count: int, steps: int, ranks: int, every: int, kinds: Mapping[str, int] = KINDS, disk: bool = False
) -> list[Fault]:
    """A script of `count` faults, spread over the steps 2 … steps - 1; each kind that there is room for comes.

    Args:
        seed: the same seed gives the same script.
        count: faults.
        steps: of the run; at least twice as many.
        ranks: of the run.
        every: steps between checkpoints.
        kinds: that may come, and how often; those first named come first where there is no room for all.
        disk: the checkpoints have a disk of their own.
    """
    chance = random.Random(seed)
    chosen = list(kinds)[:count]
    chosen += chance.choices(list(kinds), list(kinds.values()), k=count - len(chosen))
    chance.shuffle(chosen)
    script = []
    for number, kind in enumerate(chosen):
        step = 2 + int((number + 0.8 * chance.random()) * (steps - 3) / count)
        point, arrival, delay = _place(kind, chance, disk)
        if kind in _AT_SAVES:  # a disk is spoiled just before the save
            step = min(steps, -(-step // every) * every) - 2 * (point == "outside")
        # Files are rank 0's in any layout; other ranks may write some.
        rank = 0 if point == "file" else chance.randrange(ranks)
        script.append(Fault(number, kind, step, rank, point, arrival, delay, chance.random()))
    return sorted(script, key=lambda fault: (fault.step, fault.number))


def _place(kind: str, chance: random.Random, disk: bool) -> tuple[str, int, float]:
    """(point, arrival, delay) for a kind."""
    if kind in OUTSIDE or (disk and kind in DISK):
        return "outside", 1, chance.uniform(0, 0.01)
    if kind in _AT_SAVES:
        return "file", chance.randint(1, 24), 0.0
    if kind == "kill in a copy":
        return "copy", chance.randint(1, 2), 0.0
    if kind == "kill in a restart":
        return "restart", 1, chance.uniform(0.0, 0.15)
    if kind in GRADIENTS:
        return "step", 1, 0.0
    if kind in MEMORY_BITS:
        return chance.choice(("data", "forward", "backward")), 1, 0.0
    if chance.random() < 0.5:
        return "collective", chance.randint(1, 4), 0.0
    return chance.choice(_PHASES), 1, 0.0 if kind == "slow rank" else chance.choice((0.0, 0.001, 0.003))


class Marks:
    """Which faults have happened and when, and where the ranks are, in a file that outlives them.

    Args:
        path: of the file: 16 bytes per fault (when, in ns of the monotonic clock, and in which step), then 16 per rank
            (process id, and the step that it has begun last).
        faults: of the script.
    """

    _FORM = struct.Struct("<QQ")

    def __init__(self, path: Path, faults: int) -> None:
        self.path, self._faults = path, faults
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def set(self, number: int, step: int) -> None:
        """Note that a fault happens now."""
        os.pwrite(self._file, self._FORM.pack(time.monotonic_ns(), step), number * self._FORM.size)

    def get(self, number: int) -> tuple[int, int]:
        """(when, in which step); zeros if it has not happened."""
        packed = os.pread(self._file, self._FORM.size, number * self._FORM.size)
        when, step = self._FORM.unpack(packed.ljust(self._FORM.size, b"\0"))
        return when, step

    def begin(self, rank: int, step: int) -> None:
        """Note that this process is a rank and begins a step; 0: its first is still to come."""
        os.pwrite(self._file, self._FORM.pack(os.getpid(), step), (self._faults + rank) * self._FORM.size)

    def rank(self, rank: int) -> tuple[int, int]:
        """(process id, step begun last) of a rank; zeros if there has been none."""
        return self.get(self._faults + rank)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)
