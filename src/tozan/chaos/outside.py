"""Faults that come from outside of the ranks: signals by process id, damage to files, disks and networks that fail."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tozan.chaos.disk import Disk
from tozan.chaos.faults import DISK, MEMORY_LOST, NETWORK, Fault, Marks
from tozan.chaos.network import Network

_CHECKPOINT = 1 << 18
"""Bytes, fewer than a checkpoint has."""


@dataclass(frozen=True)
class Target:
    """The run that is hit.

    Attributes:
        folder: of the run.
        data: its data set.
        ranks: of its layout.
        events: gives all that the agent has told so far.
        forget_copies: lets the agent lose all memory, if it can be told.
        disk: of the checkpoints, if they have their own.
        network: between its hosts, if it has several.
    """

    folder: Path
    data: Path
    ranks: int
    events: Callable[[], list[dict[str, Any]]]
    forget_copies: Callable[[], None] | None = None
    disk: Disk | None = None
    network: Network | None = None

    @property
    def checkpoints(self) -> list[Path]:
        """Its checkpoints."""
        return list((self.folder / "checkpoints").glob("step-*"))


class Outsider(threading.Thread):
    """Waits for the step of each fault and lets it happen.

    Args:
        target: what is hit.
        faults: those from outside, by step.
        marks: where to note them.
    """

    def __init__(self, target: Target, faults: list[Fault], marks: Marks) -> None:
        super().__init__(name="chaos", daemon=True)
        self._target, self._faults, self._marks, self._over = target, faults, marks, False

    def run(self) -> None:
        """Until all faults have happened or `end` is called."""
        for fault in self._faults:
            while not self._over and self._step() < fault.step:
                time.sleep(0.001)
            if self._over:
                return
            time.sleep(fault.delay)
            self._act(fault)

    def end(self) -> None:
        """The run is over: stop waiting."""
        self._over = True
        self.join(10)

    def _step(self) -> int:
        """The step that all ranks there are have begun, whether or not there are fewer now."""
        steps = [self._marks.rank(rank) for rank in range(self._target.ranks)]
        return min(step for _, step in steps)

    def _act(self, fault: Fault) -> None:
        if fault.kind == "kill from outside":
            self._mark(fault)
            self._signal(fault.rank, signal.SIGKILL)
        elif fault.kind == "pause":
            self._mark(fault)
            self._signal(fault.rank, signal.SIGSTOP)
            time.sleep(0.02 + 0.1 * fault.chance)
            self._signal(fault.rank, signal.SIGCONT)
        elif fault.kind == "vanished folder":
            self._vanish(fault)
        elif fault.kind in DISK:
            self._spoil_disk(fault)
        elif fault.kind == "damaged shard":
            self._damage_shard(fault)
        elif fault.kind in NETWORK:
            assert self._target.network is not None
            process, _ = self._marks.rank(fault.rank)
            self._target.network.act(fault, process, lambda: self._mark(fault), self._listen("resumed"))
        else:
            self._damage_checkpoint(fault)

    def _mark(self, fault: Fault) -> None:
        self._marks.set(fault.number, self._step())

    def _signal(self, rank: int, number: signal.Signals) -> None:
        process, _ = self._marks.rank(rank)
        if process:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)

    def _listen(self, kind: str) -> Callable[[float], None]:
        """A function that waits until the agent tells of something new, for at most so many seconds."""
        known = len(self._target.events())

        def wait(seconds: float) -> None:
            end = time.monotonic() + seconds
            while not self._over and time.monotonic() < end:
                if any(event["event"] == kind for event in self._target.events()[known:]):
                    return
                time.sleep(0.01)

        return wait

    def _vanish(self, fault: Fault) -> None:
        """All checkpoints are gone, at once, as when a file system is lost."""
        self._mark(fault)
        if self._target.disk is not None:
            self._target.disk.lose()
            return
        gone = self._target.folder / f"gone-{fault.number}"
        with contextlib.suppress(OSError):
            (self._target.folder / "checkpoints").rename(gone)
            shutil.rmtree(gone)

    def _spoil_disk(self, fault: Fault) -> None:
        """The disk of the checkpoints is full or read-only until somebody has noticed."""
        disk, lost = self._target.disk, self._listen("lost")
        assert disk is not None
        self._mark(fault)
        if fault.kind == "no space":
            disk.fill(left=int(fault.chance * _CHECKPOINT))
            lost(3)
            disk.empty()
        else:
            disk.read_only(True)
            lost(3)
            disk.read_only(False)

    def _damage_shard(self, fault: Fault) -> None:
        """A shard reads wrong for as long as nobody complains, like a bad cable."""
        shard = sorted(self._target.data.glob("train-*.tar"))[0]
        good, lost = shard.read_bytes(), self._listen("lost")
        self._mark(fault)
        at = len(good) // 8
        with shard.open("r+b") as file:
            file.seek(at)
            file.write(bytes(byte ^ 255 for byte in good[at : at + len(good) // 2]))
        lost(3)
        with shard.open("r+b") as file:
            file.write(good)

    def _damage_checkpoint(self, fault: Fault) -> None:
        """The newest checkpoint is cut short or flipped, and a rank is killed; with its node's memory, if so asked."""
        while fault.kind in MEMORY_LOST and not self._over and len(self._target.checkpoints) < 3:
            time.sleep(0.001)  # where memory is lost and all checkpoints are damaged, nothing can be saved
        newest = max(self._target.checkpoints, default=None)
        if newest is not None:
            with contextlib.suppress(OSError):
                damage(newest, truncate=fault.kind.startswith("trunc"), chance=fault.chance)
        self._mark(fault)
        if fault.kind in MEMORY_LOST and self._target.forget_copies:
            self._target.forget_copies()
        self._signal(fault.rank, signal.SIGKILL)


def damage(checkpoint: Path, truncate: bool, chance: float) -> None:
    """Flip a bit of one file of a checkpoint, or cut it short."""
    files = sorted(path for path in checkpoint.iterdir() if path.stat().st_size)
    path = files[int(chance * len(files))]
    at = int(chance * path.stat().st_size)
    with path.open("r+b") as file:
        if truncate:
            file.truncate(at)
            return
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1 << int(chance * 8)]))
