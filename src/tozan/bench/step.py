"""A real training step beside its floor: its matrix products at their measured rates, its memory at a copy's speed.

The step is the trainer's own (`train_step`), in this process, on random tokens.
"""

from __future__ import annotations

import resource
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, cast

import numpy as np
import torch

from tozan.amounts import percent, scaled
from tozan.bench import measure
from tozan.bench.gemm import attention_seconds, seconds_of, step_products
from tozan.bench.result import Peak, Result, Row
from tozan.bench.show import foot, head, table
from tozan.comm import Mesh
from tozan.comm.processor import peak_memory
from tozan.config import load, presets
from tozan.config.schema import Config
from tozan.data import Dataset, Manifest
from tozan.errors import Problem, UserError
from tozan.models.arithmetic import Shape, model_flops, parameters, resolve
from tozan.models.products import Product
from tozan.models.traffic import step_bytes
from tozan.optim.adamw import AdamW
from tozan.train import Run, machine, profile
from tozan.train.checks import Checks
from tozan.train.clock import Clock
from tozan.train.precision import Precision
from tozan.train.run import FLOPS_FORMULA
from tozan.train.split import build, compiled, mesh_layout
from tozan.train.step import train_step

VOCABULARY = 50_257
"""Of a tokenizer, where neither model nor data say one: GPT-2's."""


class RandomTokens:
    """Stands in for a data set: samples without structure, at no cost.

    Args:
        shape: vocabulary and length of the samples.
    """

    skipped = 0

    def __init__(self, shape: Shape) -> None:
        self._shape = shape

    def samples(self, first: int, count: int) -> Any:
        """(count, T + 1) int64, the same for the same numbers."""
        chance = np.random.default_rng(first)
        return chance.integers(0, self._shape.vocabulary, (count, self._shape.sequence + 1), dtype=np.int64)


@dataclass(frozen=True)
class Lap:
    """One step.

    Attributes:
        seconds: of the whole step.
        phases: of its phases.
        minor_faults: pages that the kernel had to map.
        major_faults: pages that it had to read from a disk.
    """

    seconds: float
    phases: dict[str, float]
    minor_faults: int
    major_faults: int


def run(model: str, flags: Sequence[str] = (), steps: int = 6, seconds: float = 0.2, repeats: int = 6) -> Result:
    """Measure a step and its floor.

    Args:
        model: a preset, or a config's path.
        flags: `--table.key value`, as `tozan train` takes them.
        steps: measured ones, after two to warm up.
        seconds: at each matrix product, at least.
        repeats: of each matrix product, at least.

    Raises:
        UserError: no such model; a config that contradicts itself; a layout of several processes.
    """
    config = read(model, flags)
    with tempfile.TemporaryDirectory() as folder:
        work = assemble(config, Path(folder))
        laps = [lap(work) for _ in range(steps + 2)][2:]
        allocations, allocated = count_allocations(work)
    shape, micro_batch, micro_batches = work.shape, work.micro_batch, work.accumulate
    listed = step_products(shape, work.precision.dtype, micro_batch, micro_batches)
    attention = attention_seconds(shape, micro_batch, work.precision.dtype, 1, seconds, repeats)
    measured = seconds_of(listed, work.precision.dtype, seconds, repeats, attention)
    rates = [(one, median(took)) for one, took in measured]
    bandwidth = median(measure.copy_rates(seconds))
    moved = step_bytes(shape, micro_batch, micro_batches, work.precision.dtype.itemsize)
    rows = [_phase(name, laps, rates, moved, bandwidth) for name in laps[0].phases]
    best = max([work.peak_flops, *(one.flops / took for one, took in rates)])
    peak = measure.peak(config.train.precision, best)
    step = _whole(laps, rows, work, peak)
    step = step.model_copy(update={"allocations": allocations, "allocated_bytes": allocated})
    options = {"model": model, "flags": list(flags), "micro_batch": micro_batch, "micro_batches": micro_batches}
    options |= {"precision": config.train.precision, "threads": torch.get_num_threads(), "steps": steps}
    return measure.made(
        "step",
        [*rows, step],
        options,
        peaks={config.train.precision: peak},
        bandwidth=bandwidth,
        notes=_notes(),
    )


def read(model: str, flags: Sequence[str]) -> Config:
    """The config of a preset or a file, with flags; its data need not exist.

    Raises:
        UserError: it has mistakes, or asks for several processes.
    """
    given = list(flags)
    if model in presets.names():
        given = [f"--model.preset={model}", "--data.path=random", "--train.steps=1000000", *given]
    elif not Path(model).is_file():
        fix = f"one of {', '.join(presets.names())}, or the path of a config"
        raise UserError(Problem("MODEL", f"no preset and no file is called {model!r}", fix))
    config = load(None if model in presets.names() else model, given).config
    if config.layout.processes > 1:
        raise UserError(
            Problem("layout", f"asks for {config.layout.processes} processes; this measures one", "use bench scaling")
        )
    return config


def assemble(config: Config, folder: Path, mesh: Mesh | None = None) -> Run:
    """The run of a config, as `tozan train` assembles it, on random tokens; without `mesh` by itself."""
    mesh = mesh or Mesh.create(mesh_layout(config))
    threads = config.train.threads if mesh.world_size == 1 else None
    device = machine.choose_device(config.train.device)
    train = config.train
    machine.prepare(threads, train.deterministic, train.kernels, compiled=compiled(config, device), device=device)
    manifest = Path(config.data.path) / "manifest.json"
    shape = resolve(config.model, Manifest.read(manifest.parent).vocabulary if manifest.is_file() else VOCABULARY)
    precision = Precision(config.train.precision, device)
    split = build(config, shape, mesh, device, precision)
    torch.manual_seed(config.train.seed)
    optimizer = AdamW(split.sync.parameters, config.optim, split.sync.matrices)
    return Run(
        config=config,
        folder=folder,
        shape=shape,
        device=device,
        data=cast(Dataset, RandomTokens(shape)),
        validation=None,
        split=split,
        optimizer=optimizer,
        precision=precision,
        peak_flops=machine.measure_gemm_rate(precision.dtype, device),
        config_toml="",
        checks=Checks(config.checks, split, optimizer),
    )


def lap(work: Run) -> Lap:
    """Take one step."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    clock = Clock(work.device)
    result = train_step(work, clock)
    seconds, phases = clock.lap()
    after = resource.getrusage(resource.RUSAGE_SELF)
    work.step, work.samples, work.tokens = work.step + 1, work.samples + work.global_batch, work.tokens + result.tokens
    return Lap(seconds, phases, after.ru_minflt - before.ru_minflt, after.ru_majflt - before.ru_majflt)


def count_allocations(work: Run) -> tuple[int, int]:
    """How many tensors one more step allocates, and their bytes, as PyTorch's profiler sees them."""
    profile.silence()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as traced:
        lap(work)
    events = traced.profiler.kineto_results.events()
    sizes = [event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0]
    return len(sizes), sum(sizes)


def phase_of(one: Product) -> str:
    """Where the trainer makes a product: the head's gradients are made with the loss, in the forward pass."""
    return "forward" if one.direction == "forward" or one.name == "head" else "backward"


def _phase(
    name: str, laps: Sequence[Lap], rates: Sequence[tuple[Product, float]], moved: dict[str, int], bandwidth: float
) -> Row:
    mine = [(one, took) for one, took in rates if phase_of(one) == name]
    gemm = sum(one.count * took for one, took in mine)
    memory = moved.get(name, 0) / bandwidth
    return Row.of(
        name,
        "s",
        [one.phases.get(name, 0.0) for one in laps],
        floor_seconds=gemm + memory,
        gemm_seconds=gemm,
        memory_seconds=memory,
        flops=sum(one.step_flops for one, _ in mine),
        bytes=moved.get(name, 0),
        products=[
            {"product": one.name, "direction": one.direction, "shape": one.label, "count": one.count, "seconds": took}
            | {"flops": one.flops}
            for one, took in mine
        ],
    )


def _whole(laps: Sequence[Lap], rows: Sequence[Row], work: Run, peak: Peak) -> Row:
    seconds = [one.seconds for one in laps]
    rate = work.global_batch / median(seconds)
    return Row.of(
        "step",
        "s",
        seconds,
        floor_seconds=sum(row["floor_seconds"] for row in rows),
        gemm_seconds=sum(row["gemm_seconds"] for row in rows),
        memory_seconds=sum(row["memory_seconds"] for row in rows),
        tokens_per_second=rate * work.shape.sequence,
        flops_per_second=rate * model_flops(work.shape),
        mfu=rate * model_flops(work.shape) / peak.measured,
        nominal_share=rate * model_flops(work.shape) / peak.nominal if peak.nominal else None,
        parameters=parameters(work.shape),
        minor_faults=round(median(one.minor_faults for one in laps)),
        major_faults=round(median(one.major_faults for one in laps)),
        peak_bytes=peak_memory(),
    )


def _notes() -> list[str]:
    return [
        f"FLOP/s = {FLOPS_FORMULA}; MFU is its share of the best product measured here",
        "GEMM: each product of the step at its median rate alone (scores of attention once, though backward makes them "
        "again; where tozan's kernel does attention, all that it does); memory: what must be read and written between "
        "the products, at the speed of a copy",
    ]


def page(result: Result) -> list[object]:
    """What `tozan bench step` prints."""
    lines = []
    for row in result.rows:
        floor = row["floor_seconds"]
        spread = f"{scaled(row.low, 's')} to {scaled(row.high, 's')}"
        over = f"{row.median / floor:.2f}×" if floor else "—"
        rest = scaled(row.median - floor, "s")
        parts = (scaled(row["gemm_seconds"], "s"), scaled(row["memory_seconds"], "s"), rest, over)
        lines.append((row.name, scaled(row.median, "s"), spread, *parts))
    step = result.row("step")
    nominal = f", {percent(step['nominal_share'])} of the nominal peak" if step["nominal_share"] else ""
    said = (
        f"{step['tokens_per_second']:,.0f} tokens/s, {scaled(step['flops_per_second'], 'FLOP/s')}, "
        f"MFU {percent(step['mfu'])} of the best GEMM{nominal}; the products alone would take "
        f"{percent(step['gemm_seconds'] / step.median)} of the step"
    )
    memory = (
        f"page faults per step: {step['minor_faults']:,} minor, {step['major_faults']:,} major; "
        f"{step['allocations']:,} allocations of {scaled(step['allocated_bytes'], 'B')}; "
        f"peak {scaled(step['peak_bytes'], 'B')}"
    )
    phases = ("phase", "measured", "spread", "GEMM", "memory", "rest", "of floor")
    return [head(result), table(phases, lines), said, memory, "", _products(result), foot(result)]


def _products(result: Result) -> object:
    """The floor's matrix products by what they belong to and direction; attention's blocks together."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in result.rows:
        for one in row.get("products", []):
            groups.setdefault((one["product"], one["direction"]), []).append(one)
    total = result.row("step")["gemm_seconds"]
    lines = []
    for (name, direction), parts in groups.items():
        spent = sum(one["count"] * one["seconds"] for one in parts)
        rate = sum(one["count"] * one["flops"] for one in parts) / spent
        shape = parts[-1]["shape"] + (f" +{len(parts) - 1}" if len(parts) > 1 else "")
        lines.append((name, direction, shape, scaled(spent, "s"), percent(spent / total), scaled(rate, "FLOP/s")))
    return table(("product", "direction", "shape", "a step", "of GEMM", "rate"), lines, left=3)
