"""What the ranks of one node take when they share it: the trainer's units beside busy neighbours, and collectives.

Processes are started, bound to cores and joined by gloo as the trainer's are. Collectives are those of
`comm.collectives`, timed over a few sizes; the time grows with the bytes that a rank sends, as its ledger counts them.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
import torch.distributed as dist

from tozan.bench import ranks, units
from tozan.comm import Mesh, collectives, processor
from tozan.layout import Layout
from tozan.train.machine import set_allocator

SIZES = (1 << 12, 1 << 18, 1 << 21)
"""Elements of a collective's buffer (fp32): 16 KiB, 1 MiB, 8 MiB."""
WORLDS = (2, 4, 8)
"""Ranks that talk."""
REPEATS = 5


def crowd(precision: str, seconds: float, shrink: int) -> dict[str, list[float]]:
    """The units of one thread while every other core runs them too: the mean over cores."""
    every = ranks.spawn(processor.cores(), _unit_rank, precision, seconds, shrink)
    return {name: [fmean(values) for values in zip(*(one[name] for one in every), strict=True)] for name in every[0]}


def together(worlds: tuple[int, ...] = WORLDS, shrink: int = 1) -> list[dict[str, Any]]:
    """Every collective between so many ranks.

    Returns:
        Rows of `operation`, `ranks`, `latency` (s) and `rate` (bytes/s sent by a rank), as machine files have them.
    """
    rows = []
    for world in worlds:
        found = ranks.spawn(world, _collective_rank, [max(world, size // shrink) for size in SIZES])
        for operation, times in found["seconds"].items():
            sent = found["sent"][operation]
            latency, per_byte = units.fit([[1.0, float(size)] for size in sent], times)
            rate = 1 / per_byte if per_byte else sent[-1] / times[-1]
            rows.append({"operation": operation, "ranks": world, "latency": latency, "rate": rate})
    return rows


@contextmanager
def _joined(rank: int, world: int, folder: Path) -> Iterator[None]:
    """One of the trainer's ranks: on its core, with one thread, in a group with the others."""
    if hasattr(os, "sched_setaffinity"):  # macOS binds nothing
        available = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {available[rank % len(available)]})
    torch.set_num_threads(1)
    set_allocator()
    with ranks.group(rank, world, folder, "ranks", seconds=300):
        yield


def _unit_rank(
    rank: int, world: int, folder: Path, precision: str, seconds: float, shrink: int
) -> list[dict[str, list[float]]]:
    """The units of every rank."""
    with _joined(rank, world, folder):
        dist.barrier()
        found = units.measure(precision, seconds, shrink)
        (folder / f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
        dist.barrier()
        return [json.loads((folder / f"{other}.json").read_text(encoding="utf-8")) for other in range(world)]


def _collective_rank(rank: int, world: int, folder: Path, sizes: list[int]) -> dict[str, Any]:
    """Median seconds of each collective by size, with the bytes that this rank sent."""
    with _joined(rank, world, folder):
        return _collectives(sizes)


def _collectives(sizes: list[int]) -> dict[str, Any]:
    axis = Mesh.create(Layout(dp=dist.get_world_size()))["dp"]
    world = axis.size
    runs: dict[str, Callable[[torch.Tensor], Any]] = {
        "all_reduce": lambda x: collectives.all_reduce(x, axis),
        "all_gather": lambda x: collectives.all_gather(x[: x.numel() // world], axis),
        "reduce_scatter": lambda x: collectives.reduce_scatter(x, axis),
        "broadcast": lambda x: [collectives.broadcast(x, axis, source) for source in range(world)],
        "send": lambda x: collectives.shift(x, axis),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    sent: dict[str, list[int]] = {name: [] for name in runs}
    for name, run in runs.items():
        for size in sizes:
            x, times, calls = torch.zeros(size), [], world if name == "broadcast" else 1
            for _ in range(REPEATS):
                dist.barrier()
                before = axis.ledger.sum().bytes
                begin = time.perf_counter()
                run(x)
                times.append((time.perf_counter() - begin) / calls)
            seconds[name].append(median(times))
            sent[name].append((axis.ledger.sum().bytes - before) // calls)
    return {"seconds": seconds, "sent": sent}
