"""`tozan doctor`: what this machine is, what it does in a minute of measurements, what is wrong, and how to mend it."""

from __future__ import annotations

import contextlib
import mmap
import os
import resource
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from tozan.amounts import many
from tozan.bench import backends, collectives, hardware, measure, problems
from tozan.bench.hardware import Hardware
from tozan.bench.problems import Measured
from tozan.bench.ranks import group, spawn
from tozan.bench.result import Result, Row
from tozan.comm import Axis, Mesh, jobs, place
from tozan.comm.collectives import barrier
from tozan.errors import UserError
from tozan.layout import Layout
from tozan.ops import fused, native, products
from tozan.train import machine

SIZES = (64 << 10, 1 << 20, 16 << 20)
PRECISIONS = ("bf16", "fp32", "fp16")
BUFFER = 64 << 20


def run(seconds: float = 0.15) -> Result:
    """Examine this machine and this process.

    Args:
        seconds: spent on each measurement.
    """
    seen = hardware.read()
    rows, measured = _compute(seen, seconds)
    where, error = _launcher()
    measured = Measured(**{**vars(measured), "launcher_error": error, "launcher": where["launcher"]})
    routes = [one.name for one in seen.interfaces if one.up and any("." in address for address in one.addresses)]
    talked = spawn(backends.RANKS, _talk, routes, seen.shared_memory >= 4 * BUFFER)
    rows += _talk_rows(talked["routes"])
    rates = {
        name: measure.peak(name, rate, threads)
        for (name, threads), rate in measured.gemm.items()
        if threads == seen.cores
    }
    facts = {"hardware": asdict(seen), "launcher": where, "process": _process(measured)}
    return measure.made(
        "doctor",
        rows,
        {"seconds": seconds},
        peaks=rates,
        bandwidth=next(row.median for row in rows if row.name == "memory copy"),
        facts=facts | {"backends": talked["backends"]},
        problems=[asdict(one) for one in problems.find(seen, measured)],
    )


def _compute(seen: Hardware, seconds: float) -> tuple[list[Row], Measured]:
    """Everything that this process can measure alone; memory first, before anything has grown the heap."""
    threads = torch.get_num_threads()
    fresh, fresh_faults = _fill_new_buffers()
    kept = machine.keep_freed_memory()
    _fill_new_buffers()  # the first time, the heap grows
    reused, reused_faults = _fill_new_buffers()
    rows = [
        Row.of("new buffer of 64 MiB, as started", "s", fresh, minor_faults=fresh_faults),
        Row.of("new buffer of 64 MiB, as tozan sets it", "s", reused, minor_faults=reused_faults),
    ]
    pages = {}
    for name, advice in (("4 KiB pages", mmap.MADV_NOHUGEPAGE), ("huge pages", mmap.MADV_HUGEPAGE)):
        pages[name] = _touch(advice)
        rows.append(Row.of(f"first touch of 64 MiB, {name}", "s", pages[name]))
    gemm: dict[tuple[str, int], float] = {}
    for name in PRECISIONS:
        for count in sorted({1, threads, seen.cores}):
            with measure.threads(count):
                rates = [measure.peaks([name], seconds)[name].measured for _ in range(3)]
            gemm[name, count] = median(rates)
            rows.append(
                Row.of(f"matrix product {name} {many(count, 'thread')}", "FLOP/s", rates, precision=name, threads=count)
            )
    with measure.threads(seen.cores):
        rows.append(Row.of("memory copy", "bytes/s", measure.copy_rates(seconds)))
    clock = [took / 1000 for took in measure.times(_thousand_stamps, 0.0)]
    rows.append(Row.of("time stamp", "s", clock))
    everywhere = _all_cores(seen, seconds)
    found = Measured(gemm, threads, everywhere, kept, median(fresh), median(reused), clock=median(clock))
    slow, fast = (median(pages[name]) for name in ("4 KiB pages", "huge pages"))
    return rows, Measured(**{**vars(found), "small_pages": slow, "large_pages": fast})


def _fill_new_buffers(count: int = 6) -> tuple[list[float], int]:
    """Seconds to allocate, fill and free a buffer, and the page faults of one."""

    def once() -> None:
        torch.empty(BUFFER // 4).fill_(1.0)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    took = measure.times(once, 0.0, count, warm_up=0)
    return took, (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // count


def _touch(advice: int, count: int = 4) -> list[float]:
    """Seconds to write to fresh memory for the first time, in pages of one kind."""
    took = []
    for _ in range(count):
        with mmap.mmap(-1, BUFFER, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
            with contextlib.suppress(OSError):  # a kernel without huge pages takes no advice about them
                memory.madvise(advice)
            view = torch.frombuffer(memory, dtype=torch.uint8)
            begin = time.perf_counter()
            view[::4096] = 1
            took.append(time.perf_counter() - begin)
            del view
    return took


def _thousand_stamps() -> None:
    for _ in range(1000):
        time.perf_counter()


def _all_cores(seen: Hardware, seconds: float) -> float | None:
    """FLOP/s in fp32 on every core of the machine, if this process is kept from some and may leave them."""
    if seen.cores >= seen.machine_cores:
        return None
    # In a process of its own, since PyTorch's threads here were bound when they started.
    found: float | None = spawn(1, _fp32_rate, seen.online, seen.machine_cores, seconds)
    return found


def _fp32_rate(_rank: int, _ranks: int, _folder: Path, online: int, cores: int, seconds: float) -> float | None:
    try:
        os.sched_setaffinity(0, range(online))
    except OSError:
        return None
    with measure.threads(cores):
        return measure.peaks(["fp32"], seconds)["fp32"].measured


def _talk(rank: int, ranks: int, folder: Path, routes: Sequence[str], shared: bool) -> dict[str, Any]:
    """What ranks measure together: bandwidth between two of them by every route, then everything gloo can do."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    work = collectives.Work(("all_reduce",), SIZES, ("fp32",), repeats=6)
    for route in routes if rank < 2 else ():
        with group(rank, 2, folder, f"route-{route}", interface=route):
            axis = Mesh.create(Layout(dp=2))["dp"]
            found[route] = collectives.seconds(axis, work)
            if route == "lo" and shared:
                found["shared memory"] = [_through_shared_memory(axis, folder, size) for size in SIZES]
    with group(rank, ranks, folder, "trials", backend="gloo"):
        tried = backends.trials(rank, ranks)
        dist.barrier()
    return {"routes": found, "backends": {"gloo": tried}}


def _through_shared_memory(axis: Axis, folder: Path, size: int, repeats: int = 6) -> dict[str, Any]:
    """A sum of two ranks whose buffers lie in shared memory: each adds its half in place.

    tozan does not exchange gradients so yet; it shows what a node would allow.
    """
    path = Path("/dev/shm") / f"{folder.name}-{size}"
    buffers = torch.from_file(str(path), shared=True, size=size // 2, dtype=torch.float32).view(2, -1)
    half = slice(axis.index * buffers.shape[1] // 2, (axis.index + 1) * buffers.shape[1] // 2)
    buffers[axis.index].fill_(1.0)
    took = []
    for _ in range(repeats + 1):
        barrier(axis)
        begin = time.perf_counter()
        buffers[0, half].add_(buffers[1, half])
        barrier(axis)
        took.append(time.perf_counter() - begin)
    if axis.index == 0:
        path.unlink()
    return {
        "operation": "all_reduce",
        "bytes": size,
        "dtype": "fp32",
        "ranks": 2,
        "seconds": took[1:],
        "latency": False,
    }


def _talk_rows(routes: dict[str, list[dict[str, Any]]]) -> list[Row]:
    rows = []
    for route, found in routes.items():
        for one in found:
            took, size = one["seconds"], one["bytes"]
            own = {"route": route, "operation": "all_reduce", "bytes": size, "ranks": 2}
            name = f"all_reduce {size} bytes over {route}"
            if one["latency"]:
                rows.append(Row.of(name, "s", took, latency=True, **own))
            else:
                rows.append(Row.of(name, "bytes/s", [size / second for second in took], latency=False, **own))
    return rows


def _launcher() -> tuple[dict[str, Any], str]:
    """Who started this process and in which allocation; and what is wrong with their variables."""
    names = ("SLURM_", "PJM_", "OMPI_COMM_WORLD_", "PMIX_", "TORCHELASTIC_")
    variables = {name: value for name, value in sorted(os.environ.items()) if name.startswith(names)}
    given = jobs.allocation()
    found: dict[str, Any] = {"allocation": asdict(given) if given else None, "variables": variables}
    commands = ("torchrun", "mpirun", "srun", "pjsub")
    found["installed"] = [command for command in commands if shutil.which(command)]
    try:
        here = place.find()
    except (UserError, ValueError, KeyError) as error:
        return found | {"launcher": "none", "rank": 0, "world_size": 1}, str(error)
    return found | {"launcher": here.launcher, "rank": here.rank, "world_size": here.world_size}, ""


def _process(measured: Measured) -> dict[str, Any]:
    return {
        "threads": measured.threads,
        "kept": measured.kept,
        "mallopt": machine.MALLOPT if measured.kept else {},
        "kernels": native.status(),
        "products": products.status(torch.bfloat16),
        "attention": fused.status(torch.bfloat16),
        "arena": native.arena(),
        "compiler": shutil.which("c++") or shutil.which("g++") or shutil.which("clang++") or "",
    }
