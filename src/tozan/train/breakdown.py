"""Where every rank's time goes: `<run>/breakdown`, a line per record, and `<run>/timeline`, one step in detail.

Always on: `benchmarks/breakdown.py` measures what it costs.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from tozan.comm.ledger import Ledger
from tozan.comm.processor import peak_memory
from tozan.parallel.pipeline import Pipeline
from tozan.train.clock import Clock
from tozan.train.metrics import Jsonl

TIMELINE_EVERY = 100
"""Steps between two that are written in detail; the second step is, too, so that a short run has one."""
HOLD = 1.0
"""Seconds for which a rank keeps its lines: thousands of ranks share one file system."""
MOST_COLLECTIVES = 2_000


class Breakdown:
    """This rank's part of a run's breakdown.

    Args:
        folder: the run's.
        rank: this rank.
        ledger: what it says to others.
        stage: its part of a pipeline, or None.
    """

    def __init__(self, folder: Path, rank: int, ledger: Ledger, stage: Pipeline | None) -> None:
        self._rank, self._ledger, self._stage = rank, ledger, stage
        name = f"rank-{rank:06d}.json"
        for part in ("breakdown", "timeline"):
            (folder / part).mkdir(exist_ok=True)
        self._lines = Jsonl(folder / "breakdown" / f"{name}l", HOLD)
        self._timeline = folder / "timeline" / name
        self._transferred = self._transfers()
        self._began = (0.0, 0.0)

    def _transfers(self) -> dict[str, float]:
        return {axis: total.transfer for axis, total in self._ledger.by_axis.items()}

    def begin(self, step: int, clock: Clock) -> None:
        """Call before step number `step`, counted from 1: every so many are noted in detail."""
        if step == 2 or step % TIMELINE_EVERY == 0:
            clock.settle()
            clock.trace, self._began = [], (time.perf_counter(), time.time())

    def end(self, step: int, clock: Clock) -> None:
        """Call after step number `step`: write the timeline, if this is a step that has one."""
        if clock.trace is None:
            return
        clock.settle()
        marks, clock.trace = clock.trace, None
        origin, at = self._began
        entries = [e for e in self._ledger.entries if e.start >= origin][:MOST_COLLECTIVES]
        found: dict[str, Any] = {
            "step": step,
            "rank": self._rank,
            "stage": self._stage.stage if self._stage else 0,
            "at": at,
            "memory": peak_memory(),
            "phases": [(name, start - origin, end - origin) for name, start, end in marks],
            "collectives": [
                (e.operation, e.axis, e.name, e.bytes, e.start - origin, e.transfer, e.wait) for e in entries
            ],
        }
        if self._stage and (outcome := self._stage.outcome):
            shift = outcome.begin - origin
            found["actions"] = [(*s.action, s.start + shift, s.end + shift) for s in outcome.steps]
            found["pipeline"] = (shift, shift + outcome.busy + outcome.idle)
        # Whole or absent, but not synced: losing it to a power cut costs nothing, and a sync stalls the step.
        staged = self._timeline.with_suffix(".partial")
        staged.write_text(json.dumps(found), encoding="utf-8")
        staged.replace(self._timeline)

    def write(self, step: int, seconds: float, phases: dict[str, float]) -> None:
        """Write a record.

        Args:
            step: optimizer steps done.
            seconds: wall time since the last record.
            phases: where they went; they sum to `seconds`.
        """
        before, self._transferred = self._transferred, self._transfers()
        transfer = {axis: value - before.get(axis, 0.0) for axis, value in self._transferred.items()}
        self._lines.write({"step": step, "seconds": seconds, "phases": phases, "transfer": transfer})

    def close(self) -> None:
        """Leave everything on disk."""
        self._lines.close()
