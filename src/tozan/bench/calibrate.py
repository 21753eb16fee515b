"""Measures this machine and writes it as a machine file for `tozan plan`.

A few minutes of micro-benchmarks: matrix products of a training step's shapes on random operands, fused attention,
element-wise work, memory bandwidth and the cost of issuing an operation; the trainer's own units (`units`), with all
threads and with one on every core at once; collectives among local ranks at work (`between`). What they measure
are the numbers that `tozan.planner.machine` asks for, no more.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from torch.nn import functional as F

from tozan.amounts import many
from tozan.bench import between, footprint, units
from tozan.comm import processor
from tozan.cpuinfo import cpuinfo
from tozan.ops import products
from tozan.train.machine import set_allocator

SHAPES = (
    (4096, 2304, 768),
    (4096, 768, 768),
    (4096, 3072, 768),
    (4096, 768, 3072),
    (768, 3072, 4096),
    (768, 768, 4096),
)
"""Products of GPT-2 124M at micro-batch 4: forward, and weight gradients, as (rows, columns, summed)."""
SQUARE = (2048, 2048, 2048)
"""The product whose rate, against one with a short summed dimension, tells what a short one costs."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Measured:
    """What was measured; FLOP/s, bytes/s and seconds.

    Attributes:
        peak: best rate of a matrix product by precision.
        efficiency: rate over the shapes of a step, as a share of the bf16 (or fp32) peak.
        k_half: length of the summed dimension at which half the rate is lost.
        attention: rate of fused causal attention, forward and backward, as a share of the same peak.
        bandwidth: of a large copy, read and written bytes counted.
        elementwise: share of it that GELU reaches.
        launch: seconds to issue a tiny operation.
        cores: that this process may use.
        resident: bytes of memory of a rank beside its tensors.
        compiler: bytes more where activations are recomputed.
        trainer: the trainer's units, one table per number of threads, as machine files have them.
        crowding: rows of ranks and slowdown, as machine files have them.
        collectives: rows as machine files have them (see `between.together`).
    """

    peak: dict[str, float]
    efficiency: float
    k_half: float
    attention: float
    bandwidth: float
    elementwise: float
    launch: float
    cores: int
    resident: float
    compiler: float
    trainer: list[dict[str, Any]]
    collectives: list[dict[str, Any]]
    crowding: list[dict[str, float]]


def calibrate(out: Path, worlds: tuple[int, ...] = between.WORLDS, seconds: float = 0.3, shrink: int = 1) -> Measured:
    """Measure this machine and write `out`, a machine file.

    Args:
        out: file to write.
        worlds: numbers of local ranks whose collectives are measured; none leaves them out.
        seconds: time spent on each measurement.
        shrink: divides all sizes, for a rough and quick answer.
    """
    found = measure(worlds, seconds, shrink)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(toml(found), encoding="utf-8")
    return found


def measure(worlds: tuple[int, ...] = between.WORLDS, seconds: float = 0.3, shrink: int = 1) -> Measured:
    """Run all micro-benchmarks in this process, and those of several ranks in others."""
    set_allocator()
    shapes = [(m // shrink, n // shrink, k // shrink) for m, n, k in (*SHAPES, SQUARE)]
    rates = {name: [_gemm(dtype, *shape, seconds) for shape in shapes] for name, dtype in DTYPES.items()}
    peak = {name: max(found) for name, found in rates.items()}
    best = max(("bf16", "fp32"), key=lambda name: peak[name])
    work = [2.0 * m * n * k for m, n, k in shapes[:-1]]
    spent = sum(flops / rate for flops, rate in zip(work, rates[best], strict=False))
    short = _gemm(DTYPES[best], shapes[-1][0], shapes[-1][1], max(1, 64 // shrink), seconds)
    copy = _bandwidth(seconds, shrink)
    tiny = torch.ones(4)
    x = torch.randn(4096 // shrink, 3072, dtype=torch.bfloat16)
    gelu = 2 * x.numel() * x.element_size() / _time(lambda: F.gelu(x, approximate="tanh"), seconds)
    cores = processor.cores()
    torch.set_num_threads(cores)
    trainer = [{"threads": cores, "precision": best, **units.measure(best, seconds / 2, shrink)}]
    if cores > 1 and worlds:
        trainer.append({"threads": 1, "precision": best, **between.crowd(best, seconds / 2, shrink)})
    rows = between.together(worlds, shrink)
    return Measured(
        peak,
        min(1.0, sum(work) / spent / peak[best]),
        _half_length(rates[best][-1], short, shapes[-1][2], max(1, 64 // shrink)),
        min(1.0, _attention(DTYPES[best], seconds, shrink) / peak[best]),
        copy,
        min(1.0, gelu / copy),
        _time(lambda: tiny + tiny, seconds / 10),
        cores,
        *footprint.measure(min(worlds, default=1)),
        trainer,
        rows,
        between.crowding(worlds, shrink),
    )


def toml(found: Measured) -> str:
    """A machine file of one node, with the time and the software as its source."""
    numbers = ", ".join(f"{name} = {rate:.4g}" for name, rate in found.peak.items())
    source = f"measured {time.strftime('%Y-%m-%d')} by tozan bench calibrate, torch {torch.__version__}, "
    source += f"{many(torch.get_num_threads(), 'thread')} on {processor.name(cpuinfo())}"
    whole = [row["rate"] for row in found.collectives if row["operation"] == "all_reduce"]
    bus = max(whole, default=found.bandwidth)
    lines = [
        "# This machine, one rank with all threads; written by tozan bench calibrate.",
        'name = "this machine"',
        "nodes = 1",
        f"cores = {found.cores}",
        "spread = 0.15",
        "",
        "[device]",
        'kind = "cpu"',
        f"memory = {psutil.virtual_memory().total:.4g}",
        f"reserve = {found.resident:.4g}",
        f"recompute_reserve = {found.compiler:.4g}",
        f"weight_copies = {json.dumps(not products.pays(torch.bfloat16))}",
        f"bandwidth = {found.bandwidth:.4g}",
        f"bandwidth_efficiency = {found.elementwise:.4g}",
        f"peak = {{ {numbers} }}",
        f"launch = {found.launch:.3g}",
        "",
        "[device.gemm]",
        f"efficiency = {found.efficiency:.4g}",
        f"k_half = {found.k_half:.0f}",
        f"attention = {found.attention:.4g}",
        "",
        "[node]",
        "devices = 1",
        f"bandwidth = {bus:.4g}",
        "",
        "[network]",
        "bandwidth = 1e9",
        "",
        "[sources]",
        f'all = "{source}; peak is the best measured product, network is assumed"',
        "",
    ]
    for name, tables in (
        ("trainer", found.trainer),
        ("collectives", found.collectives),
        ("crowding", found.crowding),
    ):
        for table in tables:
            lines += [f"[[{name}]]", *(f"{key} = {_value(value)}" for key, value in table.items()), ""]
    return "\n".join(lines)


def _value(value: object) -> str:
    """A name, a number or a list of numbers as TOML."""
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    return f"{value:.4g}" if isinstance(value, float) else json.dumps(value)


def _half_length(long_rate: float, short_rate: float, long: int, short: int) -> float:
    """The h of rate(k) = r k / (k + h), from the rates at two lengths; 0 where short products are no slower."""
    slope = long * short_rate - short * long_rate
    return max(0.0, long * short * (long_rate - short_rate) / slope) if slope > 0 else float(long)


def _time(run: Callable[[], object], seconds: float) -> float:
    """Median seconds of one call, after two to warm up."""
    run(), run()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return median(times)


def _gemm(dtype: torch.dtype, m: int, n: int, k: int, seconds: float) -> float:
    """FLOP/s of (m × k) · (k × n) on random operands (zeros would be faster than anything real)."""
    a, b = torch.randn(m, k, dtype=dtype), torch.randn(n, k, dtype=dtype)
    return 2.0 * m * n * k / _time(lambda: F.linear(a, b), seconds)


def _attention(dtype: torch.dtype, seconds: float, shrink: int) -> float:
    """FLOP/s of fused causal attention, forward and backward; 3.5 times the forward's 2 s² d over the causal half."""
    heads, length, size = 12, 1024 // shrink, 64
    q, k, v = (torch.randn(1, heads, length, size, dtype=dtype, requires_grad=True) for _ in range(3))

    def both() -> None:
        F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()  # type: ignore[no-untyped-call]

    return 3.5 * 2 * heads * length**2 * size / _time(both, seconds)


def _bandwidth(seconds: float, shrink: int) -> float:
    """Bytes/s of copying 256 MB, read and written bytes counted."""
    source, target = torch.ones(2**26 // shrink), torch.empty(2**26 // shrink)
    return 2 * source.numel() * 4 / _time(lambda: target.copy_(source), seconds)
