"""One line for a job whose ranks leave at once when one is lost: the first to notice says who, the others are silent.

Where ranks do not wait for the heartbeat's verdict (`monitor`), because whoever started them starts them again, all of
them see a connection fail at about the same time, and none is told whose process has ended. The kernel knows it of the
processes on the same machine: ranks of that machine look there and speak first. Who speaks is decided by a counter in
the job's store, and others that have not noticed yet are told to leave, too. Where the store is gone as well, so is
rank 0, and another rank says that (see `speaker`).
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil
from torch._C._distributed_c10d import Store

from tozan.errors import say

LOOKS, PAUSE_S = 5, 0.05
"""How often, and how far apart, it is looked for a process that has ended: the kernel takes a moment to end one."""
_ANSWER_S = 2.0
"""For which the store may keep its answer to itself; behind a cut cable it does so for ever."""


class Witness:
    """What a rank knows of the processes on its machine.

    Args:
        rank: this one.
        store: the job's store.
        claim: a key in it that is only these ranks'.
        processes: process ids on this machine, by rank.
        speaks: asked whether this rank speaks where the store is gone.
        spread: has the other ranks leave, too.
    """

    def __init__(
        self,
        rank: int,
        store: Store,
        claim: str,
        processes: Mapping[int, int],
        speaks: Callable[[], bool],
        spread: Callable[[str], None],
    ) -> None:
        self._rank, self._store, self._claim, self._speaks, self._spread = rank, store, claim, speaks, spread
        self._processes = {other: process for other, process in processes.items() if other != rank}

    def tell(self, error: Exception) -> None:
        """Print the one line, unless another rank does."""
        lost = self._lost()
        first = self._first()
        if first is None:
            first, lost = self._speaks(), [rank for rank in lost if rank == 0]
        if first:
            names = ", ".join(f"rank {rank} (process {self._processes[rank]})" for rank in lost)
            what = f"{names} {'is' if len(lost) == 1 else 'are'} lost; rank" if lost else "rank"
            say(f"{what} {self._rank}: {error}")

    def _lost(self) -> list[int]:
        """Ranks of this machine whose process has ended. Nobody leaves before one has spoken, so it is the cause."""
        for _ in range(LOOKS):
            lost = [rank for rank, process in self._processes.items() if ended(process)]
            if lost:
                return lost
            time.sleep(PAUSE_S)
        return []

    def _first(self) -> bool | None:
        """Whether nobody has spoken yet; None where there is no store to tell."""
        counts: list[int] = []

        def count() -> None:
            with contextlib.suppress(RuntimeError):
                counts.append(self._store.add(self._claim, 1))
                if counts[0] == 1:
                    self._spread("a connection of a rank has failed")

        asking = threading.Thread(target=count, daemon=True)
        asking.start()
        asking.join(_ANSWER_S)
        return counts[0] == 1 if counts else None


def ended(process: int) -> bool:
    """Whether a process is gone, or is only waited for by its parent."""
    try:
        return psutil.Process(process).status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return True


def space() -> str:
    """Tells apart the containers of a machine in which process ids mean different things."""
    link = Path("/proc/self/ns/pid")
    return str(link.readlink()) if link.is_symlink() else ""
