"""A deadline for standing still: a process that hangs outside of collectives says where it stands, and ends.

Who is late in a collective is the heartbeat's business (`comm.monitor`). What nobody waits for, or not yet, is watched
here by a thread of each process: a file system that does not answer, an endless loop, a lock. Signs of progress are the
marks of the step's clock and the operations in the ledger, so a step costs nothing. The thread counts its own looks
and not the time: in a process that was stopped, or on a machine that slept, nothing stood still.

How long is too long is known from `layout.timeout` and from what steps have taken so far. The first step (which may
compile) has `FACTOR` times as long. So have the start, saves (the last one's end included) and going back, where bytes
that are read or written are signs of progress, too, and evaluations, once there has been one.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType

from tozan.checkpoint.saver import WRITER
from tozan.comm import Mesh
from tozan.comm.ledger import Ledger
from tozan.comm.monitor import Monitor, end
from tozan.config import Config
from tozan.errors import say
from tozan.train.clock import Clock

FACTOR = 10
"""How many times the longest silence so far is too long."""
STEP, START, LAST = "step", "start", "last checkpoint"
_SAVES = ("checkpoint", LAST)
_WITH_FILES = (START, *_SAVES, "going back")
"""What reads or writes files, and must show it."""
_OWN = str(Path(__file__).parents[1])


class Deadline:
    """Watches the thread that enters it; `with` starts and ends the watch.

    Args:
        rank: this rank.
        ledger: what this rank says to others.
        monitor: tells everyone, so that there is one message; None for a process that is alone.
        seconds: for which a step may show no sign of progress; 0 switches the deadline off, None has it learn.
        least: seconds that are never too long, where it learns.
        end: what ends the process; replaced in tests.
    """

    def __init__(
        self,
        rank: int,
        ledger: Ledger,
        monitor: Monitor | None,
        seconds: float | None,
        least: float,
        *,
        end: Callable[[], None] = end,
    ) -> None:
        self._rank, self._ledger, self._monitor, self._end = rank, ledger, monitor, end
        self._seconds, self._least = seconds, least
        self._interval = min(1.0, (least if seconds is None else seconds) / 10)
        self._thread = threading.Thread(target=self._run, name="tozan-deadline", daemon=True)
        self._stopped = threading.Event()
        self._now: tuple[str, int, Clock | None] = (START, 0, None)
        """What the watched thread does: its kind, the step, and the step's clock."""
        self._turns = 0
        """How often that has changed."""
        self._before: list[str] = []
        """Phases of the step before, in order."""
        self._done: set[str] = set()
        self._longest: dict[str, float] = {}
        self._seen: object = None
        self._silent, self._since = 0.0, 0.0
        self._watched, self._others = 0, set[str]()

    @staticmethod
    def of(config: Config, mesh: Mesh) -> Deadline:
        """What ends this process if its run stands still."""
        return Deadline(mesh.rank, mesh.ledger, mesh.monitor, config.recovery.deadline, config.layout.timeout)

    def __enter__(self) -> Deadline:
        self._watched = threading.get_ident()
        self._others = {thread.name for thread in _threads()} - {str(threading.get_native_id())}
        if self._seconds != 0:
            if self._monitor is not None:
                self._monitor.whereabouts = self.whereabouts
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()

    def begin(self, step: int, clock: Clock) -> None:
        """Step number `step`, counted from 1, begins."""
        if self._now[0] == STEP:
            self._done.add(STEP)
            if self._monitor is not None:
                self._monitor.settle()
        self._before, clock.marks = clock.marks or self._before, []
        self._turn(STEP, step, clock)

    @contextmanager
    def during(self, kind: str) -> Iterator[None]:
        """Inside the block goes on what takes as long as it takes: an evaluation, a save."""
        before = self._now
        self._turn(kind, before[1], None)
        try:
            yield
            self._done.add(kind)
        finally:
            self._turn(*before)

    @contextmanager
    def ends(self) -> Iterator[None]:
        """After the block no step follows: the last checkpoint is waited for, and the run's files are closed."""
        try:
            yield
        finally:
            self._turn(LAST, self._now[1], None)

    def _turn(self, kind: str, step: int, clock: Clock | None) -> None:
        self._now = (kind, step, clock)
        self._turns += 1

    def whereabouts(self) -> str:
        """Step, phase, and the line of source on which the watched thread stands."""
        kind, step, clock = self._now
        what = f"step {step}, {self._phase(clock)}" if kind == STEP else f"{kind} after step {step}" if step else kind
        return f"{what}, at {self._line()}"

    def _phase(self, clock: Clock | None) -> str:
        marks = list(clock.marks or ()) if clock else []
        if self._before[: len(marks)] == marks and len(marks) < len(self._before):
            return self._before[len(marks)]
        return f"after {marks[-1]}" if marks else "at its beginning"

    def _frames(self) -> Iterator[FrameType]:
        """Of the watched thread, innermost first; of that which writes a checkpoint while that is waited for."""
        saves = self._now[0] in _SAVES
        writer = next((thread.ident for thread in threading.enumerate() if saves and thread.name == WRITER), None)
        frame = sys._current_frames().get(writer or self._watched)
        while frame is not None:
            yield frame
            frame = frame.f_back

    def _line(self) -> str:
        frames = list(self._frames())
        own = next((frame for frame in frames if frame.f_code.co_filename.startswith(_OWN)), None)
        chosen = dict.fromkeys(frame for frame in (own, *frames[:1]) if frame is not None)
        return " → ".join(map(_place, chosen)) or "an end"

    def _limit(self, kind: str, counted: bool) -> float:
        """Seconds of silence that are too long; `counted`: bytes of files would have been seen."""
        step = max(self._least, FACTOR * self._longest.get(STEP, 0.0)) if self._seconds is None else self._seconds
        if kind == STEP:
            return step if kind in self._done else FACTOR * step
        if counted:
            return FACTOR * max(step, self._least, self._longest.get(kind, 0.0))
        return FACTOR * max(step, self._longest.get(kind, 0.0)) if kind in self._done else math.inf

    def _moved(self) -> int | None:
        """Bytes read and written by the watched thread and those begun since; None where the system does not count.

        Older threads talk to other ranks, which is no sign of progress.
        """
        try:
            counts = [(thread / "io").read_text() for thread in _threads() if thread.name not in self._others]
        except OSError:
            return None
        return sum(int(line.split()[1]) for text in counts for line in text.splitlines() if line[1:].startswith("char"))

    def _run(self) -> None:
        self._others.add(str(threading.get_native_id()))
        while not self._stopped.wait(self._interval):
            if self._look():
                message = f"{self.whereabouts()}, for {self._silent:.0f} s (since {_clock(self._since)})"
                if self._monitor is not None:
                    self._monitor.stuck = message  # rank 0 says it, and everyone ends
                    return
                say(f"rank {self._rank} stands still: {message}.")
                self._end()
                return

    def _look(self) -> bool:
        """Whether there has been no sign of progress for too long."""
        kind, _, clock = self._now
        listens = self._ledger.listening and kind in _SAVES
        waits = listens or self._ledger.oldest_open() is not None  # which the heartbeat watches
        moved = self._moved() if kind in _WITH_FILES else None
        seen = (self._turns, len(clock.marks or ()) if clock else 0, self._ledger.started(), waits, moved)
        if waits or seen != self._seen or any(frame.f_globals.get("__name__") == "bdb" for frame in self._frames()):
            if kind in self._done and not waits:
                self._longest[kind] = max(self._longest.get(kind, 0.0), self._silent)
            self._seen, self._silent, self._since = seen, 0.0, time.time()
            return False
        self._silent += self._interval
        return self._silent > self._limit(kind, moved is not None)


def _place(frame: FrameType) -> str:
    path = Path(frame.f_code.co_filename)
    return f"{path.parent.name}/{path.name}:{frame.f_lineno} in {frame.f_code.co_name}"


def _threads() -> list[Path]:
    """The threads of this process, where the kernel shows them."""
    return list(Path("/proc/self/task").glob("*"))


def _clock(moment: float) -> str:
    return time.strftime("%H:%M:%S UTC", time.gmtime(moment))
