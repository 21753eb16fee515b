"""What the processes of a run sent each other, summed from every rank's ledger."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from tozan.errors import Problem, UserError


@dataclass(frozen=True)
class Line:
    """One kind of message over one mesh axis.

    Attributes:
        axis: mesh axis, such as `dp` or `tp_col`.
        operation: collective, by PyTorch's name.
        name: what was sent.
        count: operations of the busiest rank.
        bytes: bytes sent by all ranks together.
        wait: seconds that a rank stood waiting, on average over ranks.
        transfer: seconds from start to completion, on average over ranks.
        latest: the rank that waited least: it came last, so the others waited for it.
    """

    axis: str
    operation: str
    name: str
    count: int
    bytes: int
    wait: float
    transfer: float
    latest: int


@dataclass(frozen=True)
class Rank:
    """What one rank said and waited for, over all axes.

    Attributes:
        rank: its number.
        bytes: bytes sent.
        wait: seconds that it stood waiting.
        transfer: seconds from start to completion of all its operations, most of them hidden behind computing.
        waited_for: by rank, those seconds of `wait` that it waited longer than that rank did, who came last.
    """

    rank: int
    bytes: int
    wait: float
    transfer: float
    waited_for: dict[int, float]


Row = dict[str, Any]
_SHOWN = 16
"""Ranks in the table: those that the others have waited longest for."""


def rows(run: Path) -> list[Row]:
    """Every line of every rank's ledger.

    Raises:
        UserError: the run had one process, or a rank's file is damaged.
    """
    files = sorted((run / "ledger").glob("rank-*.jsonl"))
    if not files:
        what = "has no ledger: it ran in one process, or has not ended yet"
        raise UserError(Problem(str(run), what, "name the folder of a run with a layout of several processes"))
    found = []
    for path in files:
        for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                row = json.loads(text)
                found.append({name: kind(row[name]) for name, kind in _FIELDS.items()})
                found[-1]["ranks"] = tuple(row.get("ranks", ()))
            except (ValueError, KeyError, TypeError):
                raise UserError(Problem(f"{path}:{number}", "is no line of a ledger", "run again")) from None
    return found


_FIELDS = {
    **dict.fromkeys(("rank", "count", "bytes"), int),
    **dict.fromkeys(("wait", "transfer"), float),
    **dict.fromkeys(("axis", "operation", "name"), str),
}


def by_message(found: Iterable[Row]) -> list[Line]:
    """Sums over ranks, largest volume first."""
    groups: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in found:
        groups[row["axis"], row["operation"], row["name"]].append(row)
    lines = [
        Line(
            *key,
            count=max(row["count"] for row in group),
            bytes=sum(row["bytes"] for row in group),
            wait=fmean(row["wait"] for row in group),
            transfer=fmean(row["transfer"] for row in group),
            latest=min(group, key=lambda row: row["wait"])["rank"],
        )
        for key, group in groups.items()
    ]
    return sorted(lines, key=lambda line: -line.bytes)


def by_rank(found: Iterable[Row]) -> list[Rank]:
    """Who waited for whom.

    Of the ranks that talk to each other, the one that waited least for a kind of message came last, on the whole; the
    others' waiting beyond its own is put to its account.
    """
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    own: dict[int, list[Row]] = defaultdict(list)
    blamed: dict[int, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for row in found:
        groups[row["axis"], row["ranks"], row["operation"], row["name"]].append(row)
        own[row["rank"]].append(row)
    for group in groups.values():
        last = min(group, key=lambda row: row["wait"])
        for row in group:
            if row["wait"] > last["wait"]:
                blamed[row["rank"]][last["rank"]] += row["wait"] - last["wait"]
    return [
        Rank(
            rank,
            bytes=sum(row["bytes"] for row in lines),
            wait=sum(row["wait"] for row in lines),
            transfer=sum(row["transfer"] for row in lines),
            waited_for=dict(blamed[rank]),
        )
        for rank, lines in sorted(own.items())
    ]


def table(run: Path) -> str:
    """The ledger of a run as text: by kind of message, and by rank.

    Raises:
        UserError: see `rows`.
    """
    found = rows(run)
    lines, ranks = by_message(found), by_rank(found)
    width = max((len(line.name) for line in lines), default=4)
    head = f"{'axis':8} {'operation':14} {'what':{width}} {'count':>8} {'MB sent':>10} {'wait s':>8} {'transfer s':>10}"
    text = [f"{head}  last to come"]
    text += [
        f"{line.axis:8} {line.operation:14} {line.name:{width}} {line.count:8,} {line.bytes / 1e6:10,.2f} "
        f"{line.wait:8.2f} {line.transfer:10.2f}  rank {line.latest}"
        for line in lines
    ]
    text += [f"{sum(line.bytes for line in lines) / 1e6:,.2f} MB sent by all ranks together", ""]
    return "\n".join([*text, *_rank_table(ranks)])


def _rank_table(ranks: Sequence[Rank]) -> list[str]:
    caused = {each.rank: sum(other.waited_for.get(each.rank, 0.0) for other in ranks) for each in ranks}
    shown = sorted(sorted(ranks, key=lambda each: -caused[each.rank])[:_SHOWN], key=lambda each: each.rank)
    text = [
        f"{'rank':>6} {'MB sent':>10} {'wait s':>8} {'transfer s':>10} {'others waited for it s':>23}  waited most for"
    ]
    for each in shown:
        most = max(each.waited_for.items(), key=lambda item: item[1], default=None)
        whom = f"rank {most[0]} ({most[1]:.2f} s)" if most else "nobody"
        text.append(
            f"{each.rank:6} {each.bytes / 1e6:10,.2f} {each.wait:8.2f} {each.transfer:10.2f} "
            f"{caused[each.rank]:23.2f}  {whom}"
        )
    if len(ranks) > len(shown):
        text.append(f"and {len(ranks) - len(shown)} more ranks that the others waited less for")
    return text
