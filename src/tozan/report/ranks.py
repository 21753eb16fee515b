"""The breakdown that every rank wrote: who spent how much time on what, and who is slow."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tozan.report.history import PHASES, Array, Record, records

NEWEST = 400
"""Newest records of each rank that are read: enough for a median, and little even for many ranks."""
TAIL_BYTES = 400
"""Of a record, at least: how far from the end of a file the newest ones may begin, times their number."""
SLOW = 1.1
"""A rank is slow whose own work takes this many times that of the middle rank."""
NOT_WORK = ("bubble", "evaluation", "checkpoint", "copy", "other")


@dataclass(frozen=True)
class Ranks:
    """Mean seconds of each phase of a step, by rank.

    Attributes:
        ranks: numbers of the ranks (R,).
        phases: names, in the order of a step.
        seconds: mean seconds of a record (R, phases).
        work: median seconds of a record in which a rank computed, waits and bubble left out (R,).
        transfer: mean seconds of a record in which something was on its way, by axis (R,).
        records: records that the means are over, of the rank with the fewest.
        wall: mean seconds of a record (R,).
    """

    ranks: Array
    phases: list[str]
    seconds: Array
    work: Array
    transfer: dict[str, Array]
    records: int
    wall: Array

    def share(self, phase: str) -> float:
        """Share of the wall time of all ranks."""
        return float(self.seconds[:, self.phases.index(phase)].sum() / self.wall.sum()) if phase in self.phases else 0.0

    @property
    def means(self) -> dict[str, float]:
        """Seconds of each phase, mean over ranks; phases that took no time are left out."""
        found = {name: float(self.seconds[:, index].mean()) for index, name in enumerate(self.phases)}
        return {name: value for name, value in found.items() if value > 0}


@dataclass(frozen=True)
class Slow:
    """A rank that the others wait for.

    Attributes:
        rank: its number.
        times: its work over that of its peers' middle rank.
        seconds: what it costs a step.
        phase: in which it is slowest.
    """

    rank: int
    times: float
    seconds: float
    phase: str

    def __str__(self) -> str:
        cost = f"{1e3 * self.seconds:,.3g} ms"
        return (
            f"rank {self.rank}: its own work takes {self.times:.2f}× that of its peers, {cost} a step, in {self.phase}"
        )


def read(folder: Path, since: int = 0, ranks: int | None = None) -> Ranks | None:
    """Read `<run>/breakdown`; None if there is none.

    Args:
        folder: the run's.
        since: step after which records count; a resumed run may have had another layout before.
        ranks: processes of the run; files of further ones are left over from another layout.
    """
    found: dict[int, list[Record]] = {}
    for path in sorted((folder / "breakdown").glob("rank-*.jsonl")):
        number = int(path.stem.partition("-")[2])
        if ranks is not None and number >= ranks:
            continue
        lines = {record["step"]: record for record in _tail(path) if record["step"] > since}
        if lines:
            found[number] = list(lines.values())[-NEWEST:]
    return _table(found) if found else None


def _tail(path: Path) -> list[Record]:
    """The newest records of a file, without reading all of it."""
    size, far = path.stat().st_size, NEWEST * TAIL_BYTES * 2
    if size <= far:
        return list(records(path))
    with path.open("rb") as file:
        file.seek(size - far)
        lines = file.read().split(b"\n")[1:]
    found = []
    for line in lines[-NEWEST - 1 :]:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def _table(found: dict[int, list[Record]]) -> Ranks:
    seen = {phase for lines in found.values() for line in lines for phase in line["phases"]}
    waits = sorted(phase for phase in seen if phase.startswith("wait/"))
    order = [*PHASES[:4], *waits, *PHASES[4:]]
    phases = [phase for phase in order if phase in seen] + sorted(seen - set(order))
    computing = [phase not in NOT_WORK and phase not in waits for phase in phases]
    numbers = sorted(found)
    means, work, wall = np.zeros((len(numbers), len(phases))), np.zeros(len(numbers)), np.zeros(len(numbers))
    axes = {axis for lines in found.values() for line in lines for axis in line.get("transfer", {})}
    transfer = {axis: np.zeros(len(numbers)) for axis in sorted(axes)}
    for row, number in enumerate(numbers):
        lines = found[number]
        table = np.array([[line["phases"].get(phase, 0.0) for phase in phases] for line in lines])
        means[row], wall[row] = table.mean(0), np.mean([line["seconds"] for line in lines])
        work[row] = np.median(table[:, computing].sum(1))
        for axis, column in transfer.items():
            column[row] = np.mean([line.get("transfer", {}).get(axis, 0.0) for line in lines])
    fewest = min(len(lines) for lines in found.values())
    return Ranks(np.array(numbers, dtype=np.float64), phases, means, work, transfer, fewest, wall)


def slow(ranks: Ranks, stages: int = 1) -> list[Slow]:
    """Ranks whose own work takes far longer than that of their peers, the slowest first.

    Peers are the ranks of the same pipeline stage, since stages have different work. A rank is slow if it needs
    `SLOW` times the middle rank's time and is further from it than five median deviations.

    Args:
        ranks: what was read.
        stages: pipeline stages; `pp` is the outermost axis of the mesh.
    """
    size = max(1, -(-ranks.ranks.size // stages))
    found = []
    for first in range(0, ranks.ranks.size, size):
        group = np.arange(first, min(first + size, ranks.ranks.size))
        if group.size < 3:
            continue
        middle = float(np.median(ranks.work[group]))
        spread = float(np.median(np.abs(ranks.work[group] - middle)))
        for row in group[ranks.work[group] > max(SLOW * middle, middle + 5 * spread)]:
            columns = [
                i for i, name in enumerate(ranks.phases) if not name.startswith("wait/") and name not in NOT_WORK
            ]
            excess = ranks.seconds[row][columns] - np.median(ranks.seconds[group][:, columns], axis=0)
            phase = ranks.phases[columns[int(excess.argmax())]]
            work = float(ranks.work[row])
            found.append(Slow(int(ranks.ranks[row]), work / middle, work - middle, phase))
    return sorted(found, key=lambda one: -one.times)


@dataclass(frozen=True)
class Timeline:
    """One step of every rank in detail, times in seconds from the moment when the first rank began.

    Attributes:
        step: which step.
        ranks: what each rank wrote (`tozan.train.breakdown`), by its number.
        offset: when each rank began.
    """

    step: int
    ranks: dict[int, dict[str, Any]]
    offset: dict[int, float]


def timeline(folder: Path, ranks: int | None = None) -> Timeline | None:
    """Read `<run>/timeline`; None if there is none. Of ranks that were killed in between, those of the same step count.

    The ranks of a pipeline end its last collective together, so they are laid against each other there; clocks of
    different machines need not agree. Other ranks are laid by their clocks.
    """
    found = {}
    for path in sorted((folder / "timeline").glob("rank-*.json")):
        try:
            one = json.loads(path.read_text(encoding="utf-8"))
            if ranks is None or one["rank"] < ranks:
                found[one["rank"]] = one
        except (OSError, ValueError, KeyError):
            continue
    if not found:
        return None
    steps = [one["step"] for one in found.values()]
    step = max(set(steps), key=lambda at: (steps.count(at), at))
    found = {rank: one for rank, one in found.items() if one["step"] == step}
    offset = {rank: one["at"] for rank, one in found.items()}
    if all("pipeline" in one for one in found.values()):
        offset = {rank: -one["pipeline"][1] for rank, one in found.items()}
    first = min(offset.values())
    return Timeline(step, found, {rank: at - first for rank, at in offset.items()})
