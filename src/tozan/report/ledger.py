"""What the processes of a run sent each other, summed from every rank's ledger."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

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
        latest: the rank that waited least: it came last, so the others waited for it.
    """

    axis: str
    operation: str
    name: str
    count: int
    bytes: int
    wait: float
    latest: int


def read(run: Path) -> list[Line]:
    """The ledger of a run, largest volume first.

    Raises:
        UserError: the run had one process, or a rank's file is damaged.
    """
    files = sorted((run / "ledger").glob("rank-*.jsonl"))
    if not files:
        what = "has no ledger: it ran in one process, or has not ended yet"
        raise UserError(Problem(str(run), what, "name the folder of a run with a layout of several processes"))
    rows: dict[tuple[str, str, str], list[dict[str, int | float]]] = defaultdict(list)
    for path in files:
        for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                row = json.loads(text)
                rows[row["axis"], row["operation"], row["name"]].append(row)
            except (ValueError, KeyError, TypeError):
                raise UserError(Problem(f"{path}:{number}", "is no line of a ledger", "run again")) from None
    lines = [
        Line(
            *key,
            count=int(max(row["count"] for row in found)),
            bytes=int(sum(row["bytes"] for row in found)),
            wait=fmean(row["wait"] for row in found),
            latest=int(min(found, key=lambda row: row["wait"])["rank"]),
        )
        for key, found in rows.items()
    ]
    return sorted(lines, key=lambda line: -line.bytes)


def table(run: Path) -> str:
    """The ledger of a run as text.

    Raises:
        UserError: see `read`.
    """
    lines = read(run)
    width = max(len(line.name) for line in lines)
    head = f"{'axis':8} {'operation':14} {'what':{width}} {'count':>8} {'MB sent':>10} {'wait s':>8}  last to come"
    rows = [
        f"{line.axis:8} {line.operation:14} {line.name:{width}} {line.count:8,} {line.bytes / 1e6:10,.2f} "
        f"{line.wait:8.2f}  rank {line.latest}"
        for line in lines
    ]
    total = f"{sum(line.bytes for line in lines) / 1e6:,.2f} MB sent by all ranks together"
    return "\n".join([head, *rows, total])
