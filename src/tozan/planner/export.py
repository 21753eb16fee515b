"""A plan as data: `plan.json`, which `tozan report` draws and other programs read."""

from __future__ import annotations

import json
from math import prod
from typing import TYPE_CHECKING, Any

from tozan.layout import split_layers, walk
from tozan.models.arithmetic import parameters
from tozan.planner import show
from tozan.planner.candidates import candidates
from tozan.planner.layer import Job
from tozan.planner.machine import Machine
from tozan.planner.simulate import timeline

if TYPE_CHECKING:
    from tozan.planner.plan import Choice, Plan

DRAWN = 4096
"""Actions of a pipeline up to which the file holds its timeline; a longer one is drawn by nobody."""


def data(plan: Plan, job: Job) -> dict[str, Any]:
    """The whole plan as what JSON can hold; units are SI, days for whole runs, MWh for energy, `currency` for cost."""
    machine = plan.machine
    return {
        "format": "tozan plan",
        "version": 1,
        "model": plan.model,
        "parameters": parameters(plan.shape),
        "shape": {key: getattr(plan.shape, key) for key in plan.shape.__dataclass_fields__},
        "machine": machine.name,
        "device": machine.device.model_dump(),
        "devices_per_node": machine.node.devices,
        "nodes": plan.nodes,
        "tokens": plan.tokens,
        "steps": plan.steps,
        "global_batch": plan.global_batch,
        "precision": plan.precision,
        "stack": plan.stack,
        "fits": plan.fits,
        "tried": plan.tried,
        "elapsed": plan.elapsed,
        "currency": machine.economy.currency,
        "price_per_device_hour": machine.economy.price,
        "layouts": [_layout(plan, choice) for choice in plan.choices],
        "blocks": plan.blocks,
        "pipeline": _pipeline(plan, job),
        "torus": torus(machine, plan.choices[0].devices),
        "curves": {kind: plan.curves.get(kind, []) for kind in ("strong", "weak")} if plan.curves else None,
        "notes": plan.advice,
    }


def text(plan: Plan, job: Job) -> str:
    """`data` as a JSON file; the torus map on one line for each rank would be long, so everything is compact."""
    return json.dumps(data(plan, job), ensure_ascii=False, allow_nan=False) + "\n"


def _layout(plan: Plan, choice: Choice) -> dict[str, Any]:
    """One layout with its price."""
    return {
        "name": show.name(choice),
        "layout": choice.layout,
        "devices": choice.devices,
        "seconds": choice.seconds,
        "low": choice.low,
        "high": choice.high,
        "breakdown": choice.parts,
        "memory": choice.memory,
        "memory_limit": plan.machine.device.memory,
        "flops_per_second": choice.flops * choice.devices,
        "flops_per_device": choice.flops,
        "peak_share": choice.peak_share,
        "days": choice.days,
        "overhead": choice.losses.share,
        "checkpoint_minutes": choice.losses.interval / 60,
        "checkpoint_seconds": choice.losses.write,
        "failure_days": choice.losses.between / 86_400,
        "energy": choice.megawatt_hours,
        "cost": choice.cost,
    }


def _pipeline(plan: Plan, job: Job) -> dict[str, Any] | None:
    """The best layout's schedule, its layers by stage and chunk, and when each action runs; `None` without stages."""
    one = plan.choices[0].layout
    if one["pp"] == 1:
        return None
    microbatches = plan.global_batch // (one["dp"] * one["micro_batch"])
    schedule = "zero-bubble" if one["zero_bubble"] else "interleaved" if one["chunks"] > 1 else "1f1b"
    layers = split_layers(plan.shape.layers, one["pp"], one["chunks"])
    actions = None
    if 2 * one["pp"] * one["chunks"] * microbatches <= DRAWN:
        steps = timeline(job, candidates(**one))
        actions = [[s.stage, s.action.kind, s.action.microbatch, s.action.chunk, s.start, s.end] for s in steps]
    return {
        "schedule": schedule,
        "stages": one["pp"],
        "microbatches": microbatches,
        "chunks": one["chunks"],
        "layers": [[[piece.start, piece.stop] for piece in stage] for stage in layers],
        "timeline": actions,
    }


def torus(machine: Machine, devices: int) -> dict[str, Any] | None:
    """Where every rank sits in a torus, as the launcher's rank map would put it; `None` on other networks.

    A job is given a block of three dims; on Fugaku each joins one large and one small dim of its six.
    """
    dims = machine.network.dims
    if machine.network.kind != "torus" or not dims:
        return None
    half = len(dims) // 2
    limits = [dims[i] * dims[half + i] for i in range(half)] if len(dims) == 6 else list(dims)
    per_node = machine.node.devices
    shape = block(-(-devices // per_node), limits)
    places = [list(place) for place in walk(shape) for _ in range(per_node)][:devices]
    return {"shape": list(shape), "limits": limits, "per_node": per_node, "ranks": places}


def block(nodes: int, limits: list[int]) -> tuple[int, ...]:
    """The most compact block of at least `nodes` nodes inside a torus: fewest nodes too many, then least surface."""
    best: tuple[tuple[int, int], tuple[int, ...]] | None = None
    sides: list[tuple[int, ...]] = [()]
    for limit in limits[:-1]:
        sides = [(*side, n) for side in sides for n in range(1, limit + 1)]
    for side in sides:
        last = -(-nodes // prod(side))
        if last > limits[-1]:
            continue
        shape = (*side, last)
        surface = sum(prod(shape) // n for n in shape)
        key = (prod(shape) - nodes, surface)
        if best is None or key < best[0]:
            best = (key, shape)
    return best[1] if best else tuple(limits)
