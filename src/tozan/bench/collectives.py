"""Bandwidth and latency of every collective of `tozan.comm`, between local processes or over a job's ranks.

What is meant by both stands in `NOTES`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from tozan.amounts import scaled
from tozan.bench import measure
from tozan.bench.ranks import group, spawn
from tozan.bench.result import Result, Row
from tozan.bench.show import binary, foot, head, table
from tozan.comm import Axis, Mesh, collectives, launch
from tozan.comm.place import find
from tozan.errors import Problem, UserError
from tozan.layout import Layout

NOTES = [
    "bus bandwidth = factor × B / t: B are the bytes of the whole buffer (for all_gather the result, for shift what "
    "one rank passes on), t the seconds until the last of n ranks is done",
    "factor: 2(n-1)/n for all_reduce; (n-1)/n for all_gather, reduce_scatter and all_to_all; 1 for broadcast and "
    "shift; as in nccl-tests, so that the bus bandwidth of a good algorithm does not depend on n",
    "latency: t of 8 bytes",
]
FACTORS: dict[str, Callable[[int], float]] = {
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "all_gather": lambda n: (n - 1) / n,
    "reduce_scatter": lambda n: (n - 1) / n,
    "all_to_all": lambda n: (n - 1) / n,
    "broadcast": lambda _: 1.0,
    "shift": lambda _: 1.0,
}
LATENCY_BYTES = 8
"""Of the buffer whose time counts as latency; an element for each rank at least."""


@dataclass(frozen=True)
class Work:
    """What is measured.

    Attributes:
        operations: names in `FACTORS`.
        sizes: bytes of the whole buffer.
        dtypes: of its elements.
        ranks: numbers of local processes; under a launcher, the job's ranks instead.
        repeats: of each, after two to warm up.
        interface: network interface between local processes.
    """

    operations: tuple[str, ...] = tuple(FACTORS)
    sizes: tuple[int, ...] = (1 << 10, 32 << 10, 1 << 20, 16 << 20)
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    ranks: tuple[int, ...] = (2,)
    repeats: int = 8
    interface: str = "lo"


def run(work: Work) -> Result | None:
    """Measure; under a launcher over its ranks, of which only rank 0 gets the result.

    Raises:
        UserError: an unknown operation.
    """
    wrong = [name for name in work.operations if name not in FACTORS]
    if wrong:
        raise UserError(Problem("--operations", f"there is no {wrong[0]!r}", f"some of {', '.join(FACTORS)}"))
    place = find()
    if place.world_size > 1:
        with launch.join(Layout(dp=place.world_size)) as mesh:
            rows = seconds(mesh["dp"], work)
        if place.rank:
            return None
        return measure.made("collectives", _rows(rows, place.launcher), vars(work), notes=NOTES)
    found: list[dict[str, Any]] = []
    for ranks in work.ranks:
        found += spawn(ranks, _local, work)
    return measure.made("collectives", _rows(found, work.interface), vars(work), notes=NOTES)


def _local(rank: int, ranks: int, folder: Path, work: Work) -> list[dict[str, Any]]:
    with group(rank, ranks, folder, "bench", interface=work.interface):
        return seconds(Mesh.create(Layout(dp=ranks))["dp"], work)


def seconds(axis: Axis, work: Work) -> list[dict[str, Any]]:
    """The seconds of every repeat, of the rank that took longest; a collective.

    Returns:
        One `{"operation", "bytes", "dtype", "ranks", "seconds": […]}` for each combination.
    """
    found = []
    for dtype in work.dtypes:
        for operation in work.operations:
            for size in (LATENCY_BYTES, *work.sizes):
                element = measure.DTYPES[dtype]
                count = max(axis.size, size // element.itemsize // axis.size * axis.size)
                took = _repeat(operation, torch.ones(count, dtype=element), axis, work.repeats)
                what = {"operation": operation, "bytes": count * element.itemsize, "dtype": dtype, "ranks": axis.size}
                found.append({**what, "seconds": took, "latency": size == LATENCY_BYTES})
    return found


def _repeat(operation: str, x: Tensor, axis: Axis, repeats: int) -> list[float]:
    took = torch.zeros(repeats + 2, dtype=torch.float64)
    for repeat in range(repeats + 2):
        x.fill_(1)  # or sums of sums overflow
        collectives.barrier(axis)
        begin = time.perf_counter()
        call(operation, x, axis)
        took[repeat] = time.perf_counter() - begin
    slowest: list[float] = collectives.all_reduce(took, axis, op="max")[2:].tolist()
    return slowest


def call(operation: str, x: Tensor, axis: Axis) -> Tensor:
    """One collective on a flat buffer whose length the axis divides."""
    if operation == "all_reduce":
        return collectives.all_reduce(x, axis)
    if operation == "all_gather":
        return collectives.all_gather(x[: len(x) // axis.size], axis)
    if operation == "reduce_scatter":
        return collectives.reduce_scatter(x, axis)
    if operation == "all_to_all":
        return collectives.all_to_all(x.view(axis.size, -1), axis, 0, 1)
    if operation == "broadcast":
        return collectives.broadcast(x, axis, 0)
    return collectives.shift(x, axis)


def _rows(found: Sequence[dict[str, Any]], over: str) -> list[Row]:
    rows = []
    for one in found:
        factor, size, took = FACTORS[one["operation"]](one["ranks"]), one["bytes"], one["seconds"]
        name = f"{one['operation']} {size} bytes {one['dtype']} {one['ranks']} ranks"
        fields = {key: value for key, value in one.items() if key != "seconds"} | {"over": over}
        fields |= {"seconds": median(took), "algorithm_bandwidth": size / median(took)}
        if one["latency"]:
            rows.append(Row.of(name, "s", took, **fields))
        else:
            rates = [factor * size / second for second in took]
            rows.append(Row.of(name, "bytes/s", rates, bus_bandwidth=factor * size / median(took), **fields))
    return rows


def page(result: Result) -> list[object]:
    """What `tozan bench collectives` prints: bus bandwidth by operation and size."""
    sizes = sorted({row["bytes"] for row in result.rows if not row["latency"]})
    headings = ("operation", "type", "ranks", "latency", *(binary(size) for size in sizes))
    lines: dict[tuple[str, str, str], dict[int, str]] = {}
    for row in result.rows:
        line = lines.setdefault((row["operation"], row["dtype"], str(row["ranks"])), {})
        line[0 if row["latency"] else row["bytes"]] = scaled(row.median, "s" if row["latency"] else "B/s")
    body = [(*key, *(line.get(size, "—") for size in (0, *sizes))) for key, line in lines.items()]
    over = result.rows[0]["over"]
    return [head(result), f"bus bandwidth over {over}", table(headings, body, left=2), foot(result)]
