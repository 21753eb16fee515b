"""What the ranks of one node take when they share it: the trainer's units beside busy neighbours, and collectives.

Processes are started, bound to cores and joined by gloo as the trainer's are. Collectives are those of
`comm.collectives`, timed over a few sizes; the time grows with the bytes that a rank sends, as its ledger counts them.

They are timed as they come in a step: between matrix products. Right after a barrier every rank is awake and stands
ready; at work a rank that is spoken to computes, its core may be another rank's turn, and its caches are full of
something else. What counts is what turns of computing and talking take beyond computing alone.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.distributed as dist

from tozan.bench import ranks, units
from tozan.comm import Axis, Mesh, collectives, processor
from tozan.layout import Layout
from tozan.ops import product
from tozan.train.machine import set_allocator

SIZES = (1 << 12, 1 << 18, 1 << 21)
"""Elements of a collective's buffer: 16 KiB, 1 MiB, 8 MiB in fp32; the largest among all ranks only."""
WORLDS = (2, 4, 8)
"""Ranks of a node."""
SAMPLES, WIDTH = 2, 512
"""Of the residual stream, which is what layers send."""
ROUNDS, TURNS = 3, 8
"""Rounds of so many turns of computing alone, and of as many of computing and talking."""


def crowd(precision: str, seconds: float, shrink: int) -> dict[str, list[float]]:
    """The units of one thread while every other core runs them too: the mean over cores."""
    every = ranks.spawn(processor.cores(), _unit_rank, precision, seconds, shrink)
    return {name: [fmean(values) for values in zip(*(one[name] for one in every), strict=True)] for name in every[0]}


def crowding(worlds: tuple[int, ...] = WORLDS, shrink: int = 1) -> list[dict[str, float]]:
    """What sharing a core costs beside taking turns: `ranks` of a node, and the `slowdown` of each, at least 1."""
    cores = processor.cores()
    crowded = [world for world in worlds if world > cores]
    if not crowded:
        return []
    free, *taken = (ranks.spawn(world, _crowd_rank, shrink) for world in (cores, *crowded))
    pairs = zip(crowded, taken, strict=True)
    return [{"ranks": world, "slowdown": max(1.0, cores / world * one / free)} for world, one in pairs]


def together(worlds: tuple[int, ...] = WORLDS, shrink: int = 1) -> list[dict[str, Any]]:
    """Every collective between the ranks of a node, and between parts of them that all talk at once.

    Returns:
        Rows of `operation`, `world`, `ranks`, `stride`, `item` (bytes of an element), `latency` (s) and `rate` (bytes/s
        sent by a rank), as machine files have them.
    """
    rows = []
    for world in worlds:
        for inner in (n for n in range(2, world + 1) if world % n == 0):
            for found in ranks.spawn(world, _collective_rank, inner, [n // shrink for n in SIZES], shrink):
                times, sent = found.pop("seconds"), found.pop("sent")
                latency, per_byte = units.fit([[1.0, float(size)] for size in sent], times)
                rate = 1 / per_byte if per_byte else sent[-1] / times[-1]
                rows.append({**found, "world": world, "latency": latency, "rate": rate})
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


def _collective_rank(
    rank: int, world: int, folder: Path, inner: int, sizes: list[int], shrink: int
) -> list[dict[str, Any]]:
    """Every collective among `inner` neighbours, and among those of their groups that stand at the same place."""
    with _joined(rank, world, folder):
        mesh = Mesh.create(Layout(dp=world // inner, tp=inner))
        more = partial(_more, _half_block(shrink), max(1, TURNS // shrink))
        found: list[dict[str, Any]] = []
        for axis, stride in ((mesh["tp"], 1), (mesh["dp"], inner)):
            if axis.size > 1:
                found += _collectives(axis, stride, sizes if axis.size == world else sizes[:2], more)
        return found


def _collectives(
    axis: Axis, stride: int, sizes: list[int], more: Callable[[Callable[[], Any]], float]
) -> Iterator[dict[str, Any]]:
    """What each collective adds to a turn, in seconds by size, with the bytes that this rank sends."""
    sources, size = cycle(range(axis.size)), axis.size
    wide, half = torch.float32, torch.bfloat16
    # Gradients are flat and in fp32; what layers send is cut along its tokens, and mostly in bf16.
    runs: list[tuple[str, torch.dtype, Callable[[torch.Tensor], Any]]] = [
        ("all_reduce", wide, lambda x: collectives.all_reduce(x, axis)),
        ("all_gather", wide, lambda x: collectives.all_gather(x.view(-1)[: x.numel() // size], axis)),
        ("all_gather", half, lambda x: collectives.all_gather(x[:, : x.shape[1] // size], axis, dim=1)),
        ("reduce_scatter", wide, lambda x: collectives.reduce_scatter(x.view(-1), axis)),
        ("reduce_scatter", half, lambda x: collectives.reduce_scatter(x, axis, dim=1)),
        ("broadcast", half, lambda x: collectives.broadcast(x, axis, next(sources))),
        ("send", wide, lambda x: collectives.shift(x, axis)),
    ]
    for name, dtype, run in runs:
        seconds, sent = [], []
        for elements in sizes:
            tokens = max(1, elements // (SAMPLES * WIDTH * size)) * size
            x, before = torch.zeros(SAMPLES, tokens, WIDTH, dtype=dtype), axis.ledger.sum().bytes
            for _ in range(size):
                run(x)
            sent.append((axis.ledger.sum().bytes - before) // size)
            seconds.append(more(partial(run, x)))
        row = {"operation": name, "ranks": size, "stride": stride, "item": x.element_size()}
        yield {**row, "seconds": seconds, "sent": sent}


def _half_block(shrink: int) -> Callable[[], Any]:
    """What layers compute between two collectives: a product, and a pass over the residual stream."""
    width = max(8, WIDTH // shrink)
    x, weight, stream = (torch.randn(rows, width) for rows in (2 * width, width, 2 * width))
    return lambda: stream.add_(product(x.bfloat16(), weight.T, torch.bfloat16))


def _crowd_rank(rank: int, world: int, folder: Path, shrink: int) -> float:
    """Seconds of a half block while all ranks compute one."""
    with _joined(rank, world, folder):
        compute = _half_block(shrink)
        compute()
        dist.barrier()
        begin = time.perf_counter()
        for _ in range(ROUNDS * TURNS):
            compute()
        dist.barrier()
        return (time.perf_counter() - begin) / (ROUNDS * TURNS)


def _more(compute: Callable[[], Any], turns: int, talk: Callable[[], Any]) -> float:
    """Seconds that talking adds to a turn of computing, all ranks of the node together.

    The mean, since tails count; of rounds that alternate, since a machine's speed drifts.
    """
    compute()
    spent = 0.0
    for _ in range(ROUNDS):
        for sign, also in ((-1, lambda: None), (1, talk)):
            dist.barrier()
            begin = time.perf_counter()
            for _ in range(turns):
                compute()
                also()
            dist.barrier()
            spent += sign * (time.perf_counter() - begin)
    return max(1e-6, spent / (ROUNDS * turns))
