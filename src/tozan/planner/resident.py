"""Resident memory of a rank of tozan's trainer on CPUs, tensor by tensor, at the fullest moment of a step.

Two moments compete: the output head of the last micro-batch that is in flight, with all activations held; and the end
of the backward pass, with every gradient there. Freed memory stays in the process (see `train.machine`), so the larger
counts. Autocast makes a 16-bit copy of every weight in each micro-batch's forward pass, which its graph keeps.
"""

from __future__ import annotations

from tozan.planner.books import Trip, held, units
from tozan.planner.kept import kept
from tozan.planner.machine import Machine
from tozan.schedules import create

LOGITS = 1 << 26
"""Logits of a chunk of the output loss (`ops.cross_entropy`); sharded vocabularies take `books.CHUNK_ELEMENTS`."""
SHARDED_LOGITS = 1 << 24
FLIGHT = 3
"""Units of gradients in flight over replicas, as sent and as received, at once (`parallel.synchronizer`)."""


def resident(trip: Trip, machine: Machine) -> dict[str, float]:
    """Bytes by category on the fullest rank: the first or the last stage's.

    Args:
        trip: the run.
        machine: `device.reserve` is what a rank takes before it holds a model.
    """
    ends = (_rank(trip, trip.layout.rank(pp=stage)) for stage in {0, trip.layout.pp - 1})
    found = max(ends, key=lambda parts: sum(parts.values()))
    return found | {"reserve": machine.device.reserve}


def _rank(trip: Trip, rank: int) -> dict[str, float]:
    """The categories of one rank."""
    here = trip.layout.coordinates(rank)
    sizes = held(trip, here)
    elements, word = sum(sizes.values()), trip.state_item
    share = (trip.zero_group or trip.replicas) if trip.zero else 1
    flats = [float(packing.total * word) for _, packing in units(trip, here)] if trip.replicas > 1 else []
    parameters = float(elements * word)
    if trip.zero:
        parameters = float(sum(flats)) * (1 / share if trip.zero == 3 else 1)
    depth = _in_flight(trip, here["pp"])
    blocks = sum(1 for name in sizes if name.endswith("norm1.weight"))
    kept = depth * blocks / trip.chunks * _activations(trip, trip.recomputes(here["pp"]))
    copies = 0.0 if trip.item == word else float(trip.item * sum(_matrices(sizes).values()))
    kept += (depth / trip.chunks if trip.recompute == "none" else 1) * copies
    table = word * float(sizes.get("embed.weight", 0))
    head_table = word * float(sizes.get("head.weight", sizes.get("embed.weight", 0)))
    working = _head(trip, head_table) if here["pp"] == trip.layout.pp - 1 else 0.0
    working += (2 * max(flats) if flats and trip.zero == 3 else 0.0) + (sum(flats[:1]) if trip.zero == 3 else 0.0)
    gradients, early = _gradients(trip, elements * word, flats, share)
    at_head = early + kept + working
    at_end = gradients + table
    whole = max(at_head, at_end)
    return {
        "parameters": parameters,
        "gradients": min(gradients, whole),
        "optimizer": 2.0 * elements * word / share,
        "activations": max(0.0, min(kept, whole - gradients)),
        "working": max(0.0, whole - gradients - max(0.0, min(kept, whole - gradients))),
    }


def _gradients(trip: Trip, whole: float, flats: list[float], share: int) -> tuple[float, float]:
    """Bytes of gradients at the end of the backward pass, and while the last micro-batch's activations are held."""
    if not flats:
        return whole, whole if trip.accumulate > 1 else 0.0
    flying = 2 * sum(sorted(flats)[-FLIGHT:])
    summed = sum(flats) / (share if trip.zero else trip.replicas)
    often = (trip.deterministic and trip.layout.pp == 1) or trip.zero >= 2
    early = (summed if often else whole) if trip.accumulate > 1 else 0.0
    last = summed + (sum(flats) if trip.zero == 0 else 0.0)
    return max(last, summed + flying), early


def _in_flight(trip: Trip, stage: int) -> float:
    """Pairs of micro-batch and chunk whose activations a stage holds at once."""
    if trip.layout.pp == 1:
        return 1.0
    return float(create(trip.schedule, trip.layout.pp, trip.accumulate, trip.chunks).peak_in_flight(stage))


def _matrices(sizes: dict[str, int]) -> dict[str, int]:
    """The weights that autocast copies: those of the blocks' linear layers."""
    return {
        name: size
        for name, size in sizes.items()
        if name.startswith("blocks.") and name.endswith("weight") and "norm" not in name
    }


def _activations(trip: Trip, recompute: str) -> float:
    """Bytes that one block keeps of one micro-batch (see `parallel.recompute`)."""
    layout, square = trip.layout, trip.layout.scheme != "1d"
    found = kept(
        trip.shape,
        trip.micro_batch * trip.tokens,
        trip.item,
        trip.state_item,
        tp=layout.tp,
        grid=layout.grid if square else 0,
        sequence_parallel=int(trip.sequence_parallel),
    )
    return float(getattr(found, recompute))


def _head(trip: Trip, table: float) -> float:
    """Bytes of the output head and its loss: both gradients, the table's copy, and a chunk of logits."""
    shape, layout = trip.shape, trip.layout
    columns = shape.vocabulary // layout.sizes["tp_col"]
    tokens = trip.micro_batch * shape.sequence // (layout.grid * layout.tp_depth if layout.scheme != "1d" else 1)
    width = shape.width // (layout.grid if layout.scheme != "1d" else 1)
    chunk = min(tokens * columns, LOGITS if layout.tp == 1 else SHARDED_LOGITS)
    logits = chunk * (trip.item if layout.tp == 1 else 2 * trip.state_item)
    copy = table * trip.item / trip.state_item if trip.item != trip.state_item else 0.0
    return table + 3 * tokens * width * trip.state_item + max(copy + logits + table, table)
