"""What one run will take, before it runs: seconds and phases of a step, memory of a rank, bytes that ranks send."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from tozan.config.schema import Config
from tozan.errors import Problem, UserError
from tozan.layout import Layout
from tozan.models.arithmetic import Shape, resolve
from tozan.planner import costs, local, stacks, traffic
from tozan.planner.books import Key, Trip
from tozan.planner.candidates import Candidates, candidates
from tozan.planner.intervals import bounds
from tozan.planner.kernels import ITEM
from tozan.planner.layer import Job
from tozan.planner.machine import Machine, load
from tozan.planner.memory import memory
from tozan.planner.resident import resident

RANKS_SUMMED = 512
"""Ranks up to which the bytes of all are added up one by one; of larger worlds that many evenly spaced ones stand
for the others."""


@dataclass(frozen=True)
class Prediction:
    """A forecast of one optimizer step of a run.

    Attributes:
        seconds: of the step, evaluation and checkpoints left out.
        low: lower end of the 80% interval of `seconds`.
        high: upper end.
        phases: seconds by what they are spent on; they add up to `seconds`.
        memory: bytes on the fullest rank, by category.
        trip: what decides the bytes; `traffic` reads it.
    """

    seconds: float
    low: float
    high: float
    phases: dict[str, float]
    memory: dict[str, float]
    trip: Trip = field(repr=False)

    @cached_property
    def bytes(self) -> dict[str, dict[str, int]]:
        """What all ranks together send in the step, by mesh axis and operation, as the ledger counts."""
        return total_bytes(self.trip)

    def traffic(self, rank: int) -> Counter[Key]:
        """Bytes that a rank sends in the step, by (axis, operation, name): equal to its ledger's.

        Raises:
            ValueError: no such rank.
        """
        return traffic.sent(self.trip, rank)


def predict(config: Config, machine: Path | str | Machine) -> Prediction:
    """Forecast one step of a run as the trainer would run it.

    Args:
        config: the run; batch sizes and vocabulary solved for, as `tozan.config.load` does. A vocabulary left out is
            that of the data set.
        machine: a machine, its name, or the path of a machine file.

    Raises:
        UserError: no such machine, or no data set to take the vocabulary from.
    """
    found = machine if isinstance(machine, Machine) else load(str(machine))
    trip = trip_of(config)
    job, layout = job_of(config, trip, found), candidate_of(config)
    held = {name: float(np.broadcast_to(value, 1)[0]) for name, value in memory(job, layout).parts.items()}
    # fp64 is no precision of machine files: fp32 at half the speed, and twice the bytes.
    factor = 2.0 if config.train.precision == "fp64" else 1.0
    measured = local.trainer(found, job.precision, trip) is not None
    if measured:
        phases, held = local.step(trip, found, job.precision), resident(trip, found)
    else:
        phases = {name: float(value[0]) for name, value in costs.step(job, layout).parts.items()}
    seconds = factor * sum(phases.values())
    low, high = bounds(found, seconds, measured=measured)
    return Prediction(
        seconds,
        low,
        high,
        {name: factor * value for name, value in phases.items()},
        held if measured else {name: factor * value for name, value in held.items()},
        trip,
    )


def shape_of(config: Config) -> Shape:
    """The shape of a run's model; the vocabulary is the config's, or that of its data set.

    Raises:
        UserError: neither says how large it is.
    """
    manifest = Path(config.data.path) / "manifest.json"
    ids = None
    if config.model.vocabulary is None:
        try:
            ids = json.loads(manifest.read_bytes())["vocabulary"]
        except (OSError, ValueError, KeyError, TypeError):
            what = f"is not given, and {manifest} does not say it"
            raise UserError(Problem("model.vocabulary", what, "write model.vocabulary, or build the data")) from None
    return resolve(config.model, ids)


def trip_of(config: Config) -> Trip:
    """What of a config decides the bytes of its steps.

    Raises:
        UserError: no vocabulary.
    """
    table, train = config.layout, config.train
    item = 8 if train.precision == "fp64" else ITEM[train.precision]
    return Trip(
        shape_of(config),
        Layout(table.pipeline, table.data, table.context, table.tensor, table.scheme, table.depth),
        train.micro_batch or 1,
        train.accumulate or 1,
        item,
        max(item, 4),
        4 if train.precision == "fp16" else item,
        table.zero if table.data * table.context > 1 else 0,
        table.zero_group,
        train.deterministic,
        table.sequence_parallel,
        table.schedule,
        table.chunks,
        train.recompute,
        tuple(table.split),
        tuple(train.recompute_stages),
        train.threads,
    )


def job_of(config: Config, trip: Trip, machine: Machine) -> Job:
    """The planner's job of a run."""
    batch = trip.micro_batch * trip.accumulate * trip.layout.dp
    precision = "fp32" if config.train.precision == "fp64" else config.train.precision
    return Job(trip.shape, machine, stacks.TOZAN, batch, precision)


def candidate_of(config: Config) -> Candidates:
    """The planner's candidate of a run's layout."""
    table, train = config.layout, config.train
    grid = {} if table.scheme == "1d" else {"grid": round((table.tensor // table.depth) ** 0.5), "depth": table.depth}
    return candidates(
        pp=table.pipeline,
        dp=table.data,
        cp=table.context,
        tp=table.tensor,
        micro_batch=train.micro_batch or 1,
        chunks=table.chunks,
        zero=table.zero if table.data * table.context > 1 else 0,
        recompute=train.recompute,
        sequence_parallel=int(table.sequence_parallel),
        zero_bubble=int(table.schedule == "zero-bubble"),
        **grid,
    )


def total_bytes(trip: Trip) -> dict[str, dict[str, int]]:
    """Bytes that all ranks send in a step, by axis and operation."""
    world = trip.layout.world_size
    chosen = range(world) if world <= RANKS_SUMMED else np.linspace(0, world - 1, RANKS_SUMMED).astype(int)
    sums: Counter[tuple[str, str]] = Counter()
    for rank in chosen:
        for (axis, operation, _), sent in traffic.sent(trip, int(rank)).items():
            sums[axis, operation] += sent
    found: dict[str, dict[str, int]] = {}
    for (axis, operation), sent in sorted(sums.items()):
        found.setdefault(axis, {})[operation] = sent * world // len(chosen)
    return found
