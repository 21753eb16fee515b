"""A run as a Chrome trace, which Perfetto (ui.perfetto.dev) and chrome://tracing open: one process per rank.

The step that every rank wrote in detail is drawn with its phases, its pipeline's actions and its messages; the records
of the breakdown before it with their phases one after the other, since only their lengths are known.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tozan.errors import Problem, UserError
from tozan.report import history
from tozan.report.ranks import Timeline, timeline
from tozan.report.words import phase_words

Event = dict[str, Any]
PHASES, ACTIONS, RECORDS, MESSAGES = range(4)
TRACKS = ("phases", "pipeline", "records", "messages")
NEWEST = 50
"""Records of each rank that are drawn."""


def write(run: Path, out: Path) -> Path:
    """Write the trace of a run's ranks.

    Args:
        run: the run folder.
        out: the file to write.

    Raises:
        UserError: the run has no breakdown.
    """
    found = timeline(run)
    events = [*_detail(found), *_records(run, found)]
    if not events:
        what = "has no breakdown: it has not made a step yet, or was made by an older tozan"
        raise UserError(Problem(str(run), what, "name the folder of a run"))
    rows = sorted({(event["pid"], event["tid"]) for event in events})
    text = json.dumps({"displayTimeUnit": "ms", "traceEvents": [*_names(rows), *events]})
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    return out


def _names(rows: list[tuple[int, int]]) -> Iterator[Event]:
    for rank in sorted({rank for rank, _ in rows}):
        yield {"ph": "M", "pid": rank, "name": "process_name", "args": {"name": f"rank {rank}"}}
        yield {"ph": "M", "pid": rank, "name": "process_sort_index", "args": {"sort_index": rank}}
    for rank, track in rows:
        name = TRACKS[min(track, MESSAGES)]
        yield {"ph": "M", "pid": rank, "tid": track, "name": "thread_name", "args": {"name": name}}
        yield {"ph": "M", "pid": rank, "tid": track, "name": "thread_sort_index", "args": {"sort_index": track}}


def _span(rank: int, track: int, name: str, start: float, length: float, **more: Any) -> Event:
    """A complete event; times in the format's microseconds."""
    args = {"args": more} if more else {}
    # Whole numbers, each end rounded by itself: what nests or follows still does, where readers add ts and dur.
    begin, end = (round(1e6 * at) for at in (start, start + max(length, 0.0)))
    times = {"ts": begin, "dur": end - begin}
    return {"ph": "X", "pid": rank, "tid": track, "name": name, "cat": TRACKS[track], **times, **args}


def _detail(found: Timeline | None) -> Iterator[Event]:
    for rank, one in found.ranks.items() if found else ():
        shift = found.offset[rank] if found else 0.0
        for name, start, end in one["phases"]:
            yield _span(rank, PHASES, phase_words(name), shift + start, end - start, step=one["step"])
        for kind, microbatch, chunk, start, end in one.get("actions", ()):
            name = f"{kind.replace('_', ' ')} {microbatch}"
            yield _span(rank, ACTIONS, name, shift + start, end - start, chunk=chunk)
        busy: list[float] = []
        for operation, axis, name, sent, start, transfer, wait in sorted(one["collectives"], key=lambda one: one[4]):
            more = {"axis": axis, "bytes": sent, "wait_ms": round(1e3 * wait, 3)}
            span = _span(rank, MESSAGES, f"{operation} {name}", shift + start, transfer, **more)
            yield span | {"tid": MESSAGES + _lane(busy, span)}


def _lane(busy: list[float], span: Event) -> int:
    """The first row that is free when a message starts: Perfetto drops events of one row that overlap in part.

    Args:
        busy: when each row's last message ends; a row is added if all are taken.
        span: the message.
    """
    lane = next((i for i, end in enumerate(busy) if end <= span["ts"]), len(busy))
    busy[lane : lane + 1] = [span["ts"] + span["dur"]]
    return lane


def _records(run: Path, found: Timeline | None) -> Iterator[Event]:
    """The records after the detailed step, laid out after it; every rank's begin at the same place."""
    spans = [_span(0, 0, "", *times) for times in _ends(found)]
    after = max((event["ts"] + event["dur"] for event in spans), default=0.0) / 1e6
    for path in sorted((run / "breakdown").glob("rank-*.jsonl")):
        rank, at = int(path.stem.partition("-")[2]), after
        for record in list(history.records(path))[-NEWEST:]:
            yield _span(rank, RECORDS, f"step {record['step']}", at, record["seconds"])
            inner = at
            for phase, seconds in record["phases"].items():
                end = min(inner + max(seconds, 0.0), at + record["seconds"])
                yield _span(rank, RECORDS, phase_words(phase), inner, end - inner)
                inner = end
            at += record["seconds"]


def _ends(found: Timeline | None) -> Iterator[tuple[float, float]]:
    for rank, one in found.ranks.items() if found else ():
        yield found.offset[rank] if found else 0.0, one["phases"][-1][2]
