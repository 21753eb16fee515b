"""The ledger: every collective with its name, axis, bytes, wait and transfer; torch-free.

Bytes are those *sent* by this rank, after the algorithm that `collectives` runs (a ring for all_reduce and all_gather,
direct exchange for reduce_scatter and all_to_all, a binomial tree for broadcast); n is the size of the axis and B the
size of the whole buffer (for all_gather: of the result):

| operation | bytes sent by a rank |
|---|---|
| all_reduce | 2·B·(n-1)/n |
| reduce_scatter, all_to_all | B·(n-1)/n |
| all_gather | B·(n-1)/n |
| broadcast | B × its children in the tree; n-1 children over all ranks |
| reduce | B·(n-1)/n for the scatter, plus B/n from everyone but the target |
| send | B |

Over a whole axis the all_reduce therefore sends 2·B·(n-1), the others B·(n-1).
"""

from __future__ import annotations

import json
import threading
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass
class Entry:
    """One operation of this rank.

    Attributes:
        sequence: its number among the operations over this axis, from 0; equal on all ranks of the axis.
        operation: what it was: `all_reduce`, `send`, …
        name: what it was for: `gradients`, `blocks.3`, …
        axis: mesh axis it talked over.
        ranks: global ranks of that axis.
        bytes: bytes sent by this rank.
        start: when it was started, in seconds of `time.perf_counter`.
        wait: seconds for which this rank stood still for it.
        transfer: seconds from start to completion, most of which may be hidden behind computing. Late peers are part of
            it: a rank cannot tell a slow wire from a late peer, the ledgers of all ranks together can.
    """

    sequence: int
    operation: str
    name: str
    axis: str
    ranks: tuple[int, ...]
    bytes: int
    start: float
    wait: float = 0.0
    transfer: float = 0.0

    def __str__(self) -> str:
        ranks = ", ".join(map(str, self.ranks[:8])) + (", …" if len(self.ranks) > 8 else "")
        return f"{self.operation} '{self.name}' (number {self.sequence} over {self.axis}: ranks {ranks})"


@dataclass
class Total:
    """Sums over all operations with the same axis, operation and name."""

    count: int = 0
    bytes: int = 0
    wait: float = 0.0
    transfer: float = 0.0


class Ledger:
    """What this rank has said to whom.

    Args:
        keep: newest entries kept one by one; the totals are kept over the whole run.

    Attributes:
        entries: the newest finished operations, oldest first.
        totals: sums by (axis, operation, name).
        by_axis: sums by axis, never cleared, so that a clock may ask before and after.
        listening: whether this rank waits for others through the job's store, for as long as they need.
    """

    def __init__(self, keep: int = 10_000) -> None:
        self.entries: deque[Entry] = deque(maxlen=keep)
        self.totals: dict[tuple[str, str, str], Total] = {}
        self.by_axis: dict[str, Total] = {}
        self.listening = False
        self._sequences: dict[str, int] = {}
        self._ranks: dict[str, tuple[int, ...]] = {}
        self._open: dict[int, Entry] = {}
        self._lock = threading.Lock()

    def begin(self, operation: str, name: str, axis: str, ranks: tuple[int, ...], bytes: int, start: float) -> Entry:
        """Number an operation and note it as started."""
        with self._lock:
            sequence = self._sequences.get(axis, 0)
            self._sequences[axis] = sequence + 1
            self._ranks[axis] = ranks
            entry = Entry(sequence, operation, name, axis, ranks, bytes, start)
            self._open[id(entry)] = entry
            return entry

    def end(self, entry: Entry) -> None:
        """Book a finished operation."""
        with self._lock:
            self._open.pop(id(entry), None)
            self.entries.append(entry)
            key = entry.axis, entry.operation, entry.name
            for total in (self.totals.setdefault(key, Total()), self.by_axis.setdefault(entry.axis, Total())):
                total.count += 1
                total.bytes += entry.bytes
                total.wait += entry.wait
                total.transfer += entry.transfer

    def oldest_open(self) -> Entry | None:
        """The operation started longest ago that has not ended: what this rank waits for, or will."""
        with self._lock:
            return next(iter(self._open.values()), None)

    def started(self) -> dict[str, int]:
        """How many operations were started, by axis."""
        with self._lock:
            return dict(self._sequences)

    def sum(self, axis: str | None = None, operation: str | None = None, name: str | None = None) -> Total:
        """Totals over everything that matches; None matches all."""
        result = Total()
        for (an_axis, an_operation, a_name), total in self.totals.items():
            if axis in (None, an_axis) and operation in (None, an_operation) and name in (None, a_name):
                result.count += total.count
                result.bytes += total.bytes
                result.wait += total.wait
                result.transfer += total.transfer
        return result

    def waited(self) -> float:
        """Seconds for which this rank has stood still so far, over all axes."""
        return sum(total.wait for total in self.by_axis.values())

    def clear(self) -> None:
        """Forget entries and totals; sequence numbers and the sums by axis go on."""
        with self._lock:
            self.entries.clear()
            self.totals.clear()

    def write(self, path: Path, rank: int) -> None:
        """Write the totals as JSON lines, one per (axis, operation, name): a rank's part of `tozan report ledger`."""
        lines = [
            json.dumps(
                {"rank": rank, "axis": axis, "ranks": self._ranks[axis], "operation": operation, "name": name}
                | asdict(total)
            )
            for (axis, operation, name), total in sorted(self.totals.items())
        ]
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
