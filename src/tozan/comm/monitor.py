"""The heartbeat: when a rank is lost or hangs, one message names it and the operation that everyone waited for.

Each rank has one thread that writes a beat (a counter and what the rank is doing) into the store every `interval`
seconds. Rank 0's thread reads them all. A counter that stands still for `lost_after` seconds is a lost rank; an
operation that waits for longer than `hang_after` seconds (`start_after` at the start, where ranks may be minutes apart)
is a hang, and the ranks of its axis that have started fewer operations there are late. A rank may also say of itself
that it stands still (`train.deadline`). Rank 0 prints the verdict and leaves it in the store, where the others find it:
everyone ends with `EXIT_LOST` and without a traceback. If rank 0 itself, or the store that it holds, is gone or no
longer answers (a cut cable leaves a connection that stays silent for ever), another rank says so (see `speaker`).

A beat costs one small message, so 4,096 ranks at two seconds are 2,000 messages a second for the store.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from tozan.comm.ledger import Ledger
from tozan.comm.rendezvous import UnsignedError
from tozan.comm.speaker import Speaker
from tozan.errors import EXIT_LOST, say

NOWHERE = "no collective"
"""Where a rank waits that does not."""


class Store(Protocol):
    """What the monitor needs of `torch.distributed.Store`."""

    def set(self, key: str, value: str, /) -> None: ...  # noqa: D102
    def get(self, key: str, /) -> bytes: ...  # noqa: D102
    def check(self, keys: list[str], /) -> bool: ...  # noqa: D102
    def multi_get(self, keys: list[str], /) -> list[bytes]: ...  # noqa: D102


def end() -> None:
    """End this process with `EXIT_LOST`, whatever its main thread does."""
    sys.stdout.flush()
    sys.stderr.flush()
    # The main thread stands in something that cannot be interrupted: only the whole process can end.
    os._exit(EXIT_LOST)


class Monitor:
    """Watches over all ranks from a thread of its own; `stop()` it before leaving.

    Args:
        store: a connection of its own to the job's store (not one that the main thread waits on).
        rank: this rank.
        world_size: all ranks.
        ledger: what this rank is doing.
        interval: seconds between beats.
        lost_after: seconds without a beat after which a rank is lost.
        hang_after: seconds in one operation after which the run hangs.
        start_after: the same until `settle`, if that is more.
        speaker: knows whether this rank prints that rank 0 is lost; by default rank 1 does.
        explain: after a failed operation wait for the verdict on who was lost; else leave that to others.
        end: what ends the process; replaced in tests.

    Attributes:
        outside: what this rank does outside of collectives, in a few words.
        whereabouts: says where this rank stands, outside of collectives.
        stuck: that this rank stands still, and where; everyone then ends.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        world_size: int,
        ledger: Ledger,
        *,
        interval: float = 2.0,
        lost_after: float = 12.0,
        hang_after: float = 120.0,
        start_after: float = 0.0,
        speaker: Speaker | None = None,
        explain: bool = True,
        end: Callable[[], None] = end,
    ) -> None:
        self.ledger, self.rank, self.world_size = ledger, rank, world_size
        self._store, self._end, self._explain = store, end, explain
        self._interval, self._lost_after = interval, lost_after
        self._hang_after, self._start_after, self._settled = hang_after, max(hang_after, start_after), math.inf
        self._stopped, self._count = threading.Event(), 0
        self._seen: dict[int, tuple[int, float]] = {}
        self._failed_operation: str | None = None
        self.outside = NOWHERE
        self.whereabouts: Callable[[], str] | None = None
        self.stuck: str | None = None
        self._speaker, self._silent = speaker or Speaker(rank == 1), False
        self._asked: float | None = None
        """When the store was asked something that it has not answered yet."""
        self._thread = threading.Thread(target=self._run, name="tozan-monitor", daemon=True)
        self._watch = threading.Thread(target=self._watch_store, name="tozan-monitor-watch", daemon=True)

    def start(self) -> Monitor:
        """Begin to beat."""
        self._beat()
        self._thread.start()
        self._watch.start()
        return self

    def settle(self) -> None:
        """Everyone has taken a step: from now on nobody waits for ranks that start more slowly than others."""
        self._settled = min(self._settled, time.monotonic())

    def stop(self, reason: str = "") -> None:
        """Say goodbye and stop watching; whoever waits for this rank afterwards hears the reason."""
        if not self._stopped.is_set():
            self._stopped.set()
            self._thread.join(self._lost_after)
            if self._thread.is_alive():  # in a call to a store that no longer answers
                return
            try:
                self._store.set(
                    f"beat/{self.rank}",
                    json.dumps({"n": -1, "doing": f"left the run ({reason})" if reason else "left the run"}),
                )
            except RuntimeError:  # rank 0 and its store have left before us, which is no one's concern any more
                return

    def spread(self, verdict: str) -> None:
        """Let every rank end; that there is a reason is told already."""
        with contextlib.suppress(RuntimeError):  # where a launcher held the store, it may be gone by now
            self._store.set("verdict", verdict)

    def fall_silent(self) -> None:
        """Another part of this process says what has happened."""
        self._silent = True

    def failed(self, operation: str) -> None:
        """An operation of this rank failed: wait for the verdict, which ends the process.

        Returns only if every rank is alive after all, so that the caller can raise its own error.
        """
        self._failed_operation = operation
        if not self._explain:
            return
        self._stopped.wait(self._lost_after + 3 * self._interval)

    def _run(self) -> None:
        while not self._stopped.wait(self._interval):
            try:
                self._asked = time.monotonic()
                self._beat()
                said = self._read_verdict()
                verdict = self._judge() if self.rank == 0 and not said else None
                self._asked = None
            except UnsignedError as error:
                say(str(error))
                self._end()
                return
            except RuntimeError:  # torch raises this and its DistError for a closed connection
                if self._stopped.is_set():
                    return
                self._end_without_store("its store is gone")
                return
            if verdict:
                say(verdict)
                self.spread(verdict)
            if verdict or said:
                if self.rank == 0:
                    time.sleep(2 * self._interval)  # this rank may hold the store: let the others read
                self._end()
                return

    def _watch_store(self) -> None:
        """A call to a store behind a cut cable never returns: look from outside how long it has taken."""
        while not self._stopped.wait(self._interval):
            asked = self._asked
            if asked is not None and time.monotonic() - asked > self._lost_after:
                self._end_without_store(
                    f"its store has not answered for {self._lost_after:.0f} s, or this host is cut off"
                )
                return

    def _end_without_store(self, why: str) -> None:
        if not self._silent and self._speaker.speaks():
            say(f"rank 0 is lost ({why}); rank {self.rank} was in {self._doing()}")
        if self._speaker.stays:
            time.sleep(2 * self._interval)
        self._end()

    def _doing(self) -> str:
        entry = self.ledger.oldest_open()
        return self._failed_operation or (str(entry) if entry else self.outside)

    def _beat(self) -> None:
        self._count += 1
        entry = self.ledger.oldest_open()
        beat: dict[str, Any] = {"n": self._count, "doing": self._doing(), "started": self.ledger.started()}
        if self.whereabouts is not None:
            beat["at"] = self.whereabouts()
        if self.stuck is not None:
            beat["stuck"] = self.stuck
        if entry is not None:
            beat |= {"axis": entry.axis, "ranks": entry.ranks, "sequence": entry.sequence}
            beat["seconds"] = time.perf_counter() - entry.start
        self._store.set(f"beat/{self.rank}", json.dumps(beat))

    def _read_verdict(self) -> str | None:
        if self._store.check(["verdict"]):
            return self._store.get("verdict").decode()
        return None

    def _judge(self) -> str | None:
        """Rank 0: who is lost, who is late?"""
        keys = [f"beat/{rank}" for rank in range(self.world_size)]
        if not self._store.check(keys):
            return None  # not everyone has come yet
        beats = [json.loads(text) for text in self._store.multi_get(keys)]
        now = time.monotonic()
        silent: dict[int, float] = {}
        for rank, beat in enumerate(beats):
            count, since = self._seen.get(rank, (0, now))
            if beat["n"] != count:
                self._seen[rank] = (beat["n"], now)
            elif beat["n"] >= 0:
                silent[rank] = now - since
        if any(seconds > self._lost_after for seconds in silent.values()):
            # Ranks that went together, with their host, beat at different moments: the others' time is all but up.
            enough = max(self._lost_after - 2 * self._interval, 1.5 * self._interval)
            lost = [rank for rank, seconds in silent.items() if seconds > enough]
            return _lost_message(lost, beats, self._lost_after)
        if stuck := [rank for rank, beat in enumerate(beats) if "stuck" in beat]:
            return _stuck_message(stuck, beats)
        left = {rank for rank, beat in enumerate(beats) if beat["n"] < 0}
        # A beat may be older than the first step.
        usual = self._start_after if now - self._settled < self._hang_after else self._hang_after
        hung = []
        for rank, beat in enumerate(beats):
            patience = 2 * self._interval if left & set(beat.get("ranks", ())) else usual
            if beat.get("seconds", 0.0) > patience:
                hung.append(rank)
        return _hang_message(hung, beats) if hung else None


def _names(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"


def _lost_message(lost: list[int], beats: list[dict[str, Any]], seconds: float) -> str:
    waiting = [rank for rank, beat in enumerate(beats) if rank not in lost and beat.get("doing") != NOWHERE]
    first = next((beats[r]["doing"] for r in waiting if set(lost) & set(beats[r].get("ranks", ()))), None)
    first = first or next((beats[rank]["doing"] for rank in waiting), NOWHERE)
    are = "is" if len(lost) == 1 else "are"
    return (
        f"{_names(lost)} {are} lost: no sign of life for {seconds:.0f} s (last seen in {beats[lost[0]].get('doing')}). "
        f"Everyone waited in {first}."
    )


def _stuck_message(stuck: list[int], beats: list[dict[str, Any]]) -> str:
    others = f" So do{'es' if len(stuck) == 2 else ''} {_names(stuck[1:])}." if len(stuck) > 1 else ""
    return f"rank {stuck[0]} stands still: {beats[stuck[0]]['stuck']}.{others}"


def _hang_message(hung: list[int], beats: list[dict[str, Any]]) -> str:
    """Of all operations that wait too long, the one whose axis has late ranks is the cause."""
    for rank in hung:
        beat = beats[rank]
        axis, sequence = beat["axis"], beat["sequence"]
        late = [
            other
            for other in beat["ranks"]
            if beats[other]["n"] < 0 or beats[other].get("started", {}).get(axis, 0) <= sequence
        ]
        if late:
            doing = ", ".join(filter(None, (beats[late[0]]["doing"], beats[late[0]].get("at"))))
            return (
                f"hang: {_names(late)} did not come. Everyone waited for {beat['seconds']:.0f} s in {beat['doing']}; "
                f"rank {late[0]}: {doing}."
            )
    beat = beats[hung[0]]
    return f"hang: rank {hung[0]} has waited for {beat['seconds']:.0f} s in {beat['doing']}, and everyone has come."
