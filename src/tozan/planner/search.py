"""All layouts of a job on a number of nodes, priced; the fastest that fit in memory come out.

Enumeration is by rules, not by hope: a layout is a candidate if the shards exist (`tozan.layout` would cut them).
Memory is cheap to price and comes first; only what fits is timed.
"""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter

import numpy as np

from tozan.planner import costs
from tozan.planner.candidates import Candidates, Floats, Ints, candidates
from tozan.planner.layer import Job
from tozan.planner.memory import memory

BLOCK = 16384
"""Candidates priced at once: their arrays stay in the processor's caches."""


@dataclass(frozen=True)
class Options:
    """What a search may use.

    Attributes:
        tensor: allow tensor parallelism; grids (2D and 2.5D) too if `grids`.
        grids: allow 2D and 2.5D tensor parallelism.
        context: allow context parallelism.
        pipeline: allow pipeline parallelism.
        zero: ZeRO stages to try.
        recompute: kinds of recomputation to try, by number in `candidates.RECOMPUTE`.
        offload: places of the optimizer's state to try, by number in `candidates.OFFLOAD`.
        spare: share of the devices that may stay unused for a layout that divides well.
    """

    tensor: bool = True
    grids: bool = True
    context: bool = True
    pipeline: bool = True
    zero: tuple[int, ...] = (0, 1, 2, 3)
    recompute: tuple[int, ...] = (0, 1, 2)
    offload: tuple[int, ...] = (0, 1, 2)
    spare: float = 0.1


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        candidates: those that fit, fastest first, or the nearest to fitting if none does.
        seconds: of a step, in the same order.
        tried: how many layouts were priced.
        fitting: how many of them fit in memory.
        elapsed: seconds that the search took.
    """

    candidates: Candidates
    seconds: Floats
    tried: int
    fitting: int
    elapsed: float


def search(job: Job, devices: int, options: Options | None = None, keep: int = 50) -> Found:
    """Price every layout of `job` on up to `devices` devices.

    Args:
        job: model, machine, stack and batch.
        devices: ranks there are.
        options: what may be used.
        keep: how many to return.
    """
    begin = perf_counter()
    options = options or Options()
    everything = enumerate_layouts(job, devices, options)
    best: list[tuple[Floats, Ints]] = []
    nearest: list[tuple[Floats, Ints]] = []
    fitting = 0
    for start in range(0, len(everything), BLOCK):
        index = np.arange(start, min(start + BLOCK, len(everything)))
        block = everything.pick(index)
        priced = memory(job, block)
        fits = np.broadcast_to(priced.fits(job), len(block))
        fitting += int(fits.sum())
        if fits.any():
            seconds = costs.step(job, block.pick(fits)).seconds
            order = np.argsort(seconds, kind="stable")[:keep]
            best.append((seconds[order], index[fits][order]))
        elif not best:
            total = np.broadcast_to(priced.total, len(block))
            order = np.argsort(total, kind="stable")[:keep]
            nearest.append((total[order], index[order]))
    chosen = best or nearest
    if not chosen:
        return Found(everything, np.zeros(0), 0, 0, perf_counter() - begin)
    keys, places = (np.concatenate([pair[part] for pair in chosen]) for part in (0, 1))
    order = np.argsort(keys, kind="stable")[:keep]
    picked = everything.pick(places[order])
    seconds = keys[order] if best else costs.step(job, picked).seconds
    return Found(picked, seconds, len(everything), fitting, perf_counter() - begin)


def enumerate_layouts(job: Job, devices: int, options: Options) -> Candidates:
    """Every candidate that uses at most `devices`, and no fewer than the spare share allows.

    Meshes first (few), then every combination of micro-batch, chunks, ZeRO, recomputation, sequence parallelism,
    schedule and offload that makes sense on them.
    """
    meshes = _meshes(job, devices, options)
    if not len(meshes):
        return candidates(pp=np.zeros(0))
    switches = _switches(job, options)
    rows = np.repeat(np.arange(len(meshes)), len(switches))
    pp, dp, cp, tp, grid, depth = meshes[rows].T
    micro, chunks, zero, recompute, parallel, bubble, offload = np.tile(switches, (len(meshes), 1)).T
    layers = job.shape.layers
    keep = job.global_batch % (dp * micro) == 0
    batches = job.global_batch // np.maximum(1, dp * micro)
    keep &= (chunks == 1) | ((pp > 1) & (layers % (pp * chunks) == 0) & (batches % pp == 0))
    keep &= (bubble == 0) | ((pp > 1) & (chunks == 1) & (batches >= pp))
    keep &= (parallel == 0) | ((tp > 1) & (grid == 0) & (job.shape.sequence % tp == 0))
    keep &= (zero == 0) | (dp * cp > 1)
    # Gradients sharded after every micro-batch would be reduced again and again by a pipeline: nobody runs that.
    keep &= (zero < 2) | (pp == 1)
    keep &= (offload == 0) | (zero > 0) | (dp * cp == 1)
    return Candidates(
        *(
            column[keep]
            for column in (
                pp,
                dp,
                cp,
                tp,
                grid,
                depth,
                micro,
                chunks,
                zero,
                recompute,
                parallel,
                bubble,
                offload,
            )
        )
    )


def _meshes(job: Job, devices: int, options: Options) -> Ints:
    """Rows of pp, dp, cp, tp, grid, depth: the largest replicas count that divides the batch and still fits."""
    shape, batch = job.shape, job.global_batch
    replicas = _divisors(batch)
    found = []
    for tp, grid, depth in _tensor(job, devices, options):
        pieces = [1]
        if options.context and job.stack.flash and not grid:
            pieces = [c for c in (1, 2, 4, 8, 16, 32) if shape.sequence % (2 * c) == 0 and shape.sequence // c >= 1024]
        for cp in pieces:
            for pp in range(1, min(shape.layers, devices // (tp * cp)) + 1 if options.pipeline else 2):
                # Uneven pipelines are fine, but not those in which a stage has nothing to do.
                if -(-shape.layers // pp) * (pp - 1) >= shape.layers:
                    continue
                room = devices // (tp * cp * pp)
                place = int(np.searchsorted(replicas, room, side="right"))
                for dp in replicas[max(0, place - 1) : place]:
                    if pp * cp * tp * dp >= (1 - options.spare) * min(devices, pp * cp * tp * batch):
                        found.append((pp, int(dp), cp, tp, grid, depth))
    meshes = np.array(found, dtype=np.int64).reshape(-1, 6)
    used = np.prod(meshes[:, :4], axis=1)
    # A machine larger than the batch can use: take what comes nearest to it.
    return meshes[used >= (1 - options.spare) * min(devices, used.max())] if len(meshes) else meshes


def _tensor(job: Job, devices: int, options: Options) -> list[tuple[int, int, int]]:
    """Sizes of tensor parallelism as (tp, grid, depth): head counts that divide; grids of 2D and 2.5D."""
    shape = job.shape
    limit = min(devices, 64) if options.tensor else 1
    flat = [
        (tp, 0, 1)
        for tp in range(1, limit + 1)
        if shape.heads % tp == 0 and (shape.kv_heads % tp == 0 or tp % shape.kv_heads == 0)
    ]
    if not (options.grids and options.tensor):
        return flat
    grids = [
        (q * q * depth, q, depth)
        for q in (2, 3, 4, 6, 8)
        for depth in (1, 2, 4)
        if q * q * depth <= limit and depth <= q and shape.kv_heads % q == 0 and shape.width % q == 0
    ]
    return flat + grids


def _switches(job: Job, options: Options) -> Ints:
    """Rows of micro_batch, chunks, zero, recompute, sequence_parallel, zero_bubble, offload."""
    micros = [m for m in (1, 2, 4, 8, 16, 32, 64) if job.global_batch % m == 0]
    chunks = [1, *(v for v in (2, 3, 4, 5, 6, 8) if options.pipeline)]
    host = job.machine.host
    places = [place for place in options.offload if place == 0 or (host.memory if place == 1 else host.nvme) > 0]
    grid = np.meshgrid(micros, chunks, options.zero, options.recompute, (0, 1), (0, 1), places, indexing="ij")
    rows = np.stack([axis.ravel() for axis in grid], axis=1).astype(np.int64)
    sensible: Ints = rows[(rows[:, 1] == 1) | (rows[:, 5] == 0)]
    return sensible


def _divisors(number: int) -> Ints:
    """All divisors, ascending."""
    return np.array([d for d in range(1, number + 1) if number % d == 0], dtype=np.int64)
