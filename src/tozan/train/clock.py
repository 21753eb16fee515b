"""Where a step's time goes: wall time split into named phases, on a GPU by its own clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from tozan.comm.ledger import Ledger

WHOLE = ("evaluation", "checkpoint")
"""Phases that keep their waits: they are not part of what a step costs."""


class Timeline(Protocol):
    """What tells the time of moments in a thread's work."""

    def stamp(self) -> Any:
        """Note this moment."""

    def read(self, stamps: Sequence[Any]) -> list[float]:
        """Seconds of `time.perf_counter` at which moments came, in the order in which they were noted."""


class HostTimeline:
    """That of a thread that computes itself."""

    def stamp(self) -> float:
        """Now."""
        return time.perf_counter()

    def read(self, stamps: Sequence[float]) -> list[float]:
        """The same."""
        return list(stamps)


class GpuTimeline:
    """That of a GPU's work: a moment comes when the GPU has done what it was given before.

    To note one does not wait for the GPU, so that it is given the next phase's work while it is at this one's.

    Args:
        event: makes an event of the GPU, as `torch.cuda.Event`.
    """

    def __init__(self, event: Callable[[], Any] | None = None) -> None:
        self._event = event or (lambda: torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]
        self._known = self.stamp(), time.perf_counter()

    def stamp(self) -> Any:
        """Note the moment behind what the GPU has been given so far."""
        event = self._event()
        event.record()
        return event

    def read(self, stamps: Sequence[Any]) -> list[float]:
        """Waits for the last of the moments."""
        if not stamps:
            return []
        stamps[-1].synchronize()
        before, at = self._known
        # From one moment to the next: an event tells milliseconds in 32 bits, too few for a long run.
        seconds = []
        for stamp in stamps:
            at += before.elapsed_time(stamp) / 1e3
            before = stamp
            seconds.append(at)
        self._known = before, at
        return seconds


def timeline(device: torch.device) -> Timeline:
    """The timeline of work on a device."""
    return GpuTimeline() if device.type == "cuda" else HostTimeline()


class Clock:
    """Splits wall time into named phases that sum to it.

    `mark(phase)` charges the time since the last mark; what nobody charged is `other`. Waits for other ranks are taken
    out of the phase in which they happened and charged to `wait/<axis>`, as the ledger has measured them.

    Args:
        device: whose work is timed.
        ledger: this rank's.

    Attributes:
        trace: where to note (phase, start, end) of every mark, in seconds of `time.perf_counter`; None: nowhere.
        marks: where to note the phase of every mark; None: nowhere.
        tokens: trained on since the last lap; counted by whoever trains.
    """

    def __init__(self, device: torch.device | None = None, ledger: Ledger | None = None) -> None:
        self._timeline = timeline(device or torch.device("cpu"))
        self._axes = (ledger or Ledger()).by_axis
        self._waited = self._waits()
        [self._start] = self._timeline.read([self._timeline.stamp()])
        self._last = self._start
        self._unread: list[tuple[str, Any, Mapping[str, float]]] = []
        self._phases: dict[str, float] = {}
        self.trace: list[tuple[str, float, float]] | None = None
        self.marks: list[str] | None = None
        self.tokens = 0

    def _waits(self) -> dict[str, float]:
        return {axis: total.wait for axis, total in self._axes.items()}

    def mark(self, phase: str) -> None:
        """Charge the time since the last mark to `phase`, less its waits."""
        if self.marks is not None:
            self.marks.append(phase)
        before, self._waited = self._waited, self._waits()
        waits = {axis: now - before.get(axis, 0.0) for axis, now in self._waited.items()}
        self._unread.append((phase, self._timeline.stamp(), waits))

    def settle(self) -> None:
        """Bring `trace` and the phases up to the last mark; on a GPU, wait for it."""
        seconds = self._timeline.read([stamp for _, stamp, _ in self._unread])
        for (phase, _, waits), now in zip(self._unread, seconds, strict=True):
            if self.trace is not None:
                self.trace.append((phase, self._last, now))
            self._charge(phase, now - self._last, waits)
            self._last = now
        self._unread.clear()

    def _charge(self, phase: str, span: float, waits: Mapping[str, float]) -> None:
        for axis, waited in waits.items():
            if waited > 0.0 and phase not in WHOLE:
                # Operations that overlap on several threads must not count the same second twice.
                waited = min(waited, span)
                span -= waited
                self._phases[f"wait/{axis}"] = self._phases.get(f"wait/{axis}", 0.0) + waited
        self._phases[phase] = self._phases.get(phase, 0.0) + span

    def move(self, phase: str, to: str, seconds: float) -> None:
        """Charge `seconds` of a phase to another one."""
        self._phases[phase] = self._phases.get(phase, 0.0) - seconds
        self._phases[to] = self._phases.get(to, 0.0) + seconds

    def lap(self) -> tuple[float, dict[str, float]]:
        """Seconds since the last lap and their phases in seconds; starts a new lap."""
        self.mark("other")
        self.settle()
        seconds, phases = self._last - self._start, self._phases
        self._start, self._phases, self.tokens = self._last, {}, 0
        return seconds, phases
