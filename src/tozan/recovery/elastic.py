"""Which layout a run takes when there are fewer ranks than it was made for.

Global batch and micro-batch stay, and with them the samples of every step. Under `train.deterministic` layouts that
also keep every bit come first: those of replicas, ZeRO and pipelines, with the tensor parallelism that there was. Of
these the planner takes the fastest that fits in memory, if it knows the machine; else it is the nearest, which gives up
replicas first, then pipeline stages, then tensor parallelism.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from tozan.config import Config, load
from tozan.config.check import check
from tozan.errors import UserError
from tozan.planner import costs, machine, predict
from tozan.planner.candidates import join
from tozan.planner.machine import Machine
from tozan.planner.memory import memory
from tozan.planner.predict import candidate_of, job_of, trip_of

PRICED = 2048
"""Layouts that are forecast one by one, times their ranks; which, the planner's coarse prices of all decide."""


@dataclass(frozen=True)
class Shape:
    """Ranks of a generation, and the flags that make the config fit them.

    Attributes:
        ranks: their number.
        flags: `--table.key=value`, to follow the user's own.
        seconds: of a step as the planner forecasts it, where it chose.
    """

    ranks: int
    flags: tuple[str, ...] = ()
    seconds: float | None = field(default=None, compare=False)


def fitting(config: Path, flags: Sequence[str], available: int, together: int | None = None) -> Shape | None:
    """The layout for at most `available` ranks: the config's own, the fastest, or the nearest; None if there is none.

    Args:
        config: the TOML file.
        flags: the user's flags.
        available: ranks that can be had.
        together: ranks that share a node, and its memory; None: all.
    """
    own = load(config, flags).config
    if own.layout.processes <= available:
        return Shape(own.layout.processes)
    shapes = list(shrunk(own, available))
    if not shapes:
        return None
    chosen, seconds = _fastest(own, shapes, together or available) or (_nearest(own, shapes), None)
    return Shape(chosen.layout.processes, tuple(_flags(own, chosen)), seconds)


def shrunk(own: Config, available: int) -> Iterator[Config]:
    """Every config of at most `available` ranks with the same batches that tozan can run.

    Of the numbers of replicas only the largest is tried with each number of stages and of tensor-parallel ranks.
    """
    micro_batches = (own.train.accumulate or 1) * own.layout.data
    for tensor in _divisors(own.layout.tensor):
        for pipeline in range(1, min(own.model.layers, available // (tensor * own.layout.context)) + 1):
            room = available // (tensor * own.layout.context * pipeline)
            data = next(d for d in range(min(room, micro_batches), 0, -1) if micro_batches % d == 0)
            for zero in range(4) if data * own.layout.context > 1 else (own.layout.zero,):
                found = _changed(own, data, pipeline, tensor, zero)
                if _runs(found) and not check(found):
                    yield found


def _changed(own: Config, data: int, pipeline: int, tensor: int, zero: int) -> Config:
    """A config with other sizes, and without what was meant for the old ones."""
    layout: dict[str, Any] = {"data": data, "pipeline": pipeline, "tensor": tensor, "zero": zero}
    train: dict[str, Any] = {"accumulate": (own.train.accumulate or 1) * own.layout.data // data}
    if pipeline != own.layout.pipeline:
        layout["split"], train["recompute_stages"] = [], []
        if own.layout.chunks > 1:
            layout |= {"chunks": 1, "schedule": "1f1b"}
    if tensor == 1:
        layout |= {"scheme": "1d", "depth": 1, "sequence_parallel": False}
    if zero == 0 or data * own.layout.context % (own.layout.zero_group or 1):
        layout["zero_group"] = None
    tables = {"layout": own.layout.model_copy(update=layout), "train": own.train.model_copy(update=train)}
    return own.model_copy(update=tables)


def _runs(config: Config) -> bool:
    """Whether the pipeline can be had (the rest of a smaller layout can, where the larger one could)."""
    layout = config.layout
    whole = layout.chunks == 1 or (config.train.accumulate or 1) % layout.pipeline == 0
    masks = layout.pipeline == 1 or not config.model.dropout  # they would depend on the layout
    return whole and masks and layout.pipeline * layout.chunks <= config.model.layers


def _flags(own: Config, chosen: Config) -> Iterator[str]:
    """What makes the one config of the other, and the batches, which no solving may change."""
    always = {"data", "pipeline", "tensor", "global_batch", "micro_batch", "accumulate"}
    for name in ("layout", "train"):
        before = getattr(own, name)
        for key, value in getattr(chosen, name):
            if key in always or value != getattr(before, key):
                yield f"--{name}.{key}={'none' if value is None else str(value).lower()}"


def _changes_bits(own: Config, other: Config) -> bool:
    return own.train.deterministic and other.layout.tensor != own.layout.tensor


def _nearest(own: Config, shapes: Sequence[Config]) -> Config:
    """The one that gives up least."""

    def loss(config: Config) -> tuple[Any, ...]:
        new, old = config.layout, own.layout
        odd = old.pipeline % new.pipeline != 0 or new.data > old.data
        return -new.tensor, odd, -new.pipeline, -new.data, abs(new.zero - old.zero)

    return min(shapes, key=loss)


def _fastest(own: Config, shapes: Sequence[Config], together: int) -> tuple[Config, float] | None:
    """The fastest that fits in memory by the planner's forecast, and its seconds; None where it cannot tell."""
    try:
        where = machine_of(own)
        if where is None:
            return None
        for _, alike in groupby(sorted(shapes, key=lambda c: _changes_bits(own, c)), lambda c: _changes_bits(own, c)):
            priced = [(predict(config, where), config) for config in _promising(list(alike), where)]
            fit = [(p.seconds, c) for p, c in priced if sum(p.memory.values()) <= _room(where, c, together)]
            if fit:
                seconds, config = min(fit, key=lambda pair: pair[0])
                return config, seconds
    except (UserError, ValueError, ArithmeticError, LookupError) as error:  # a forecast must not end a run
        print(
            f"tozan: the planner cannot choose the layout, so it is the nearest: {error}", file=sys.stderr, flush=True
        )
    return None


def machine_of(config: Config) -> Machine | None:
    """The machine of `recovery.machine`, else of `machine.toml` in the run's folder.

    Raises:
        UserError: it cannot be read.
    """
    own = Path(config.run.folder) / "machine.toml"
    named = config.recovery.machine or (str(own) if own.is_file() else None)
    return machine.load(named) if named else None


def _promising(shapes: list[Config], where: Machine) -> list[Config]:
    """Those worth a forecast of their own, by the price of all at once."""
    most = max(4, PRICED // max(config.layout.processes for config in shapes))
    if len(shapes) <= most:
        return shapes
    trip, layouts = trip_of(shapes[0]), join([candidate_of(config) for config in shapes])
    job = job_of(shapes[0], trip, where)
    seconds = np.where(memory(job, layouts).fits(job), costs.step(job, layouts).seconds, np.inf)
    return [shapes[place] for place in np.argsort(seconds, kind="stable")[:most]]


def _room(where: Machine, config: Config, together: int) -> float:
    """Bytes that a rank may take: of a device, or of a node whose ranks share its cores."""
    return where.device.memory / (min(together, config.layout.processes) if where.cores else 1)


def _divisors(size: int) -> list[int]:
    return [divisor for divisor in range(1, size + 1) if size % divisor == 0]
