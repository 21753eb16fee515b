"""What all measurements share: repeating something for a while, and a file that says where its numbers come from."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

import tozan
from tozan.amounts import many
from tozan.bench.result import Kind, Peak, Result, Row
from tozan.comm import processor
from tozan.train import machine

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


def times(run: Callable[[], object], seconds: float = 0.2, least: int = 5, warm_up: int = 1) -> list[float]:
    """Seconds of each call.

    Args:
        run: what is measured.
        seconds: go on until this much time has passed.
        least: fewest calls.
        warm_up: calls before, which do not count.
    """
    for _ in range(warm_up):
        run()
    found: list[float] = []
    end = time.perf_counter() + seconds
    while len(found) < least or time.perf_counter() < end:
        begin = time.perf_counter()
        run()
        found.append(time.perf_counter() - begin)
    return found


def copy_rates(seconds: float = 0.3, megabytes: int = 256, least: int = 5) -> list[float]:
    """Bytes/s of copies between two large buffers, read and written bytes counted."""
    source = torch.ones(megabytes << 18)
    target = torch.empty_like(source)
    moved = 2 * source.numel() * source.element_size()
    return [moved / took for took in times(lambda: target.copy_(source), seconds, least)]


def peaks(precisions: Sequence[str], seconds: float = 0.3) -> dict[str, Peak]:
    """The best rate of a square matrix product in each precision, with the threads of this process."""
    device = torch.device("cpu")
    return {name: peak(name, machine.measure_gemm_rate(DTYPES[name], device, seconds)) for name in precisions}


def peak(precision: str, measured: float, threads: int | None = None) -> Peak:
    """A measured rate beside the nominal one.

    Args:
        precision: of both.
        measured: FLOP/s.
        threads: that were used; default: those of this process.
    """
    found = processor.nominal(precision, threads or torch.get_num_threads())
    return Peak(measured=measured, nominal=found.flops, how=found.how)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute with so many threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def made(kind: Kind, rows: list[Row], options: Mapping[str, Any], **fields: Any) -> Result:
    """A result of this machine, now; the load of the machine is among its notes if it was not idle."""
    notes = list(fields.pop("notes", []))
    unknown = {one.how for one in fields.get("peaks", {}).values() if one.nominal is None and one.how}
    notes += [f"no nominal peak: {why}" for why in sorted(unknown)]
    load = os.getloadavg()[0]
    if load > processor.cores() + 1:
        notes.append(
            f"the machine was busy: load {load:.1f} on {many(processor.cores(), 'core')}, so times are too long"
        )
    return Result(
        kind=kind,
        created=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        machine=machine.describe(),
        versions=versions(),
        options=dict(options),
        rows=rows,
        notes=notes,
        **fields,
    )


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    return {
        "tozan": tozan.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "kernel": platform.release(),
        "libc": " ".join(platform.libc_ver()),
    }
