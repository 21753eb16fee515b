"""Faults that come from outside of the ranks: signals by process id, and damage to files."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tozan.chaos.faults import MEMORY_LOST, Fault, Marks
from tozan.recovery.agent import Agent


class Outsider(threading.Thread):
    """Waits for the step of each fault and lets it happen.

    Args:
        agent: whose ranks are hit.
        faults: those from outside, by step.
        marks: where to note them.
        run: the run's folder.
        data: its data set.

    Attributes:
        recovered: set by others when ranks were lost, which ends the faults that last.
    """

    def __init__(self, agent: Agent, faults: list[Fault], marks: Marks, run: Path, data: Path) -> None:
        super().__init__(name="chaos", daemon=True)
        self.recovered = threading.Event()
        self._agent, self._faults, self._marks = agent, faults, marks
        self._run, self._data, self._over = run, data, False

    def run(self) -> None:
        """Until all faults have happened or `end` is called."""
        for fault in self._faults:
            while not self._over and self._step() < fault.step:
                time.sleep(0.001)
            if self._over:
                return
            time.sleep(fault.delay)
            self._act(fault)

    def told(self, tell: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
        """A listener to the agent that passes on what it hears."""

        def hear(event: dict[str, Any]) -> None:
            self.recovered.set()
            tell(event)

        return hear

    def end(self) -> None:
        """The run is over: stop waiting."""
        self._over = True
        self.join(10)

    def _step(self) -> int:
        return min((last for last, _ in self._agent.node.begun().values()), default=0)

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
        elif fault.kind == "damaged shard":
            self._damage_shard(fault)
        else:
            self._damage_checkpoint(fault)

    def _mark(self, fault: Fault) -> None:
        self._marks.set(fault.number, self._step())

    def _signal(self, rank: int, number: signal.Signals) -> None:
        process = self._agent.node.processes.get(rank)
        if process:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)

    def _vanish(self, fault: Fault) -> None:
        """All checkpoints are gone, at once, as when a file system is lost."""
        self._mark(fault)
        gone = self._run / f"gone-{fault.number}"
        with contextlib.suppress(OSError):
            (self._run / "checkpoints").rename(gone)
            shutil.rmtree(gone)

    def _damage_shard(self, fault: Fault) -> None:
        """A shard reads wrong for as long as nobody complains, like a bad cable."""
        shard = sorted(self._data.glob("train-*.tar"))[0]
        good = shard.read_bytes()
        self.recovered.clear()
        self._mark(fault)
        at = len(good) // 8
        with shard.open("r+b") as file:
            file.seek(at)
            file.write(bytes(byte ^ 255 for byte in good[at : at + len(good) // 2]))
        self.recovered.wait(3)
        with shard.open("r+b") as file:
            file.write(good)

    def _checkpoints(self) -> list[Path]:
        return list((self._run / "checkpoints").glob("step-*"))

    def _damage_checkpoint(self, fault: Fault) -> None:
        """The newest checkpoint is cut short or flipped, and a rank is killed; with its node's memory, if so asked."""
        while fault.kind in MEMORY_LOST and not self._over and len(self._checkpoints()) < 3:
            time.sleep(0.001)  # where memory is lost and all checkpoints are damaged, nothing can be saved
        newest = max(self._checkpoints(), default=None)
        if newest is not None:
            with contextlib.suppress(OSError):
                damage(newest, truncate=fault.kind.startswith("trunc"), chance=fault.chance)
        self._mark(fault)
        if fault.kind in MEMORY_LOST:
            self._agent.forget_copies()
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
