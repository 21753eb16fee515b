"""Bytes that every rank sends in one optimizer step, exactly as the ledger of the run will count them.

This walks through a step as the trainer does and books each collective, without tensors: shards are those of
`layout.shard`, flat buffers those of `layout.Packing`, messages those of the schedule.
"""

from __future__ import annotations

from collections import Counter

from tozan.layout import AXES, SEGMENT, shard
from tozan.models.arithmetic import parameter_shapes
from tozan.planner import traffic_model
from tozan.planner.books import LOSSES_ITEM, Books, Key, Line, Trip, held, residual, role, units
from tozan.schedules import create

CHECK_WORDS, CHECK_ITEM = 6, 8
"""What a rank says before each update, beside a checksum for every axis (`train.checks.Row`), and bytes of a word."""


def sent(trip: Trip, rank: int) -> Counter[Key]:
    """Bytes that a rank sends in one step, by (axis, operation, name).

    Raises:
        ValueError: no such rank.
    """
    return +books(trip, rank).sent


def books(trip: Trip, rank: int) -> Books:
    """The ledger of a rank's step, with the number of operations.

    Raises:
        ValueError: no such rank.
    """
    found = Books(trip, rank)
    traffic_model.passes(found)
    _messages(found)
    _replicas(found)
    _bookkeeping(found)
    return found


def _messages(books: Books) -> None:
    """What pipeline stages send each other: activations, their gradients, a tied embedding's parts, losses."""
    trip, axis = books.trip, books.axis("pp")
    if axis.size == 1:
        return
    message = residual(trip) * trip.state_item
    schedule = create(trip.schedule, axis.size, trip.accumulate, trip.chunks)
    for action in schedule.actions[axis.index]:
        if schedule.sends_to(axis.index, action) not in (None, axis.index):
            books.add(axis, "send", f"pipeline {action.kind}", message)
    if trip.shape.tied and axis.index == 0:
        books.add(axis, "send", "tied embedding", message, trip.accumulate)
    if trip.shape.tied and axis.index == axis.size - 1:
        elements = held(trip, books.here)["embed.weight"]
        if trip.hands_over:
            packing = next(packing for _, packing in units(trip, books.here) if "embed.weight" in packing.offsets)
            elements = packing.total // (trip.replicas if trip.deterministic else trip.zero_group or trip.replicas)
        books.add(axis, "send", "tied embedding", elements * trip.state_item)
    books.gather(axis, "losses", axis.size * trip.accumulate, trip.state_item)


def _replicas(books: Books) -> None:
    """Gradients and parameters over data-parallel ranks."""
    trip, dp = books.trip, books.replicas
    if dp.size == 1:
        return
    shards = trip.zero_group if trip.zero and trip.zero_group else dp.size
    hybrid = shards < dp.size
    inside = Line(f"{dp.name}_shards", shards, dp.index % shards) if hybrid else dp
    across = Line(f"{dp.name}_replicas", dp.size // shards, dp.index // shards)
    in_order = trip.deterministic
    often = trip.accumulate if trip.sums_often else 1
    for unit, packing in units(trip, books.here):
        name, total = f"gradients of {unit}", packing.total
        axis = inside if hybrid and not in_order else dp
        # The first stage gets the sum of a tied embedding from the last.
        if not ("embed.weight" in packing.offsets and books.here["pp"] == 0 and trip.tied_apart(0)):
            books.scatter(axis, name, total, total // axis.size, trip.state_item, often)
        if hybrid and in_order:
            books.gather(across, name, packing.shard, trip.state_item)
        elif hybrid:
            books.all_reduce(across, name, packing.shard, trip.state_item, ordered=True)
        if trip.zero == 0:
            books.gather(dp, name, total, trip.state_item)
        elif trip.zero < 3:
            books.gather(inside, f"parameters of {unit}", total, trip.state_item)
        else:
            # A block is gathered before its forward and its backward pass; the last one stays in between.
            blocks = trip.shape.layers
            last = unit == f"block {blocks - 1}"
            times = trip.accumulate * (1 if last else 2) if unit.startswith("block ") else 1
            books.gather(inside, f"parameters of {unit}", total, trip.state_item, times)
    if trip.zero:
        squares = sum(packing.shard // SEGMENT for _, packing in units(trip, books.here)) * inside.size
        books.gather(inside, "gradient norm", squares, LOSSES_ITEM)


def _bookkeeping(books: Books) -> None:
    """Small things at the end of a step: tokens, losses, partial gradients, gradient norm, checks, whether to stop."""
    trip, dp = books.trip, books.replicas
    books.gather(dp, "tokens", dp.size, LOSSES_ITEM)
    books.gather(dp, "losses", dp.size * trip.accumulate, LOSSES_ITEM)
    for axes, elements in _partial(books).items():
        for name in axes:
            books.all_reduce(books.axis(name), "tp gradients", elements, trip.state_item)
    label = "+".join(("pp", "tp_depth", "tp_row", "tp_col"))
    books.all_reduce(
        books.axis("pp", "tp", label=label), "gradient norm", len(parameter_shapes(trip.shape)), LOSSES_ITEM
    )
    everyone = Line("world", trip.layout.world_size, 0)
    books.all_reduce(everyone, "stop?", 1, LOSSES_ITEM)
    books.gather(everyone, "checks", everyone.size * (CHECK_WORDS + len(AXES)), CHECK_ITEM)


def _partial(books: Books) -> Counter[tuple[str, ...]]:
    """Elements of gradients of which each tensor-parallel rank has a part, by the axes that they are summed over."""
    trip, layout, found = books.trip, books.trip.layout, Counter[tuple[str, ...]]()
    token_axes = ("tp_depth", "tp_row") if layout.scheme != "1d" else ("tp_col",) if trip.sequence_parallel else ()
    if layout.tp == 1 or not token_axes:
        return found
    heads = (trip.shape.heads, trip.shape.kv_heads)
    sizes = parameter_shapes(trip.shape)
    own = _slices(books)
    for name, elements in own.items():
        axes = []
        for axis in token_axes:
            ends = ({**books.here, axis: index} for index in (0, layout.sizes[axis] - 1))
            first, last = (shard(role(name), sizes[name], layout, there, heads) for there in ends)
            if layout.sizes[axis] > 1 and first == last:
                axes.append(axis)
        if axes:
            found[tuple(axes)] += elements
    return found


def _slices(books: Books) -> dict[str, int]:
    """Elements of every parameter whose gradient a rank has at the end of a step: all it holds, or ZeRO's slice."""
    trip = books.trip
    if trip.zero == 0 or trip.replicas == 1:
        return held(trip, books.here)
    index = books.replicas.index % (trip.zero_group or trip.replicas)
    found = {}
    for _, packing in units(trip, books.here):
        for name in packing.sizes:
            piece = packing.own(name, index)[0]
            found[name] = piece.stop - piece.start
    return found
