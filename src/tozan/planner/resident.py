"""Resident memory of a rank of tozan's trainer on CPUs, tensor by tensor, at the fullest moment of a step.

Moments compete: the output head of the last micro-batch that is in flight, with all activations held; the launch of
each unit of gradients; and the end of the backward pass, with every gradient there. Freed memory stays in the process
(see `train.machine`), so the largest counts. Autocast makes a 16-bit copy of every weight in each micro-batch's forward
pass, which its graph keeps; where products are tozan's own there is none.
"""

from __future__ import annotations

from dataclasses import dataclass

from tozan.planner.books import CHUNK_ELEMENTS, Trip, held, residual, units
from tozan.planner.kept import kept
from tozan.planner.machine import Machine
from tozan.schedules import create

LOGITS = 1 << 26
"""Logits of a chunk of the output loss (`ops.cross_entropy`); sharded vocabularies take `books.CHUNK_ELEMENTS`."""
IN_FLIGHT = 2
"""Units of gradients on their way to the replicas at once (`parallel.synchronizer`)."""
CHUNK_BYTES = 4 << 20
"""Larger buffers are cut into pieces, which are copies, before they are sent (`comm.collectives`)."""


def resident(trip: Trip, machine: Machine) -> dict[str, float]:
    """Bytes by category on the fullest rank: the first or the last stage's.

    Args:
        trip: the run.
        machine: `device.reserve` is what a rank takes beside its tensors, `device.recompute_reserve` what it takes more
            if it recomputes, and `device.weight_copies` says whether mixed precision copies weights.
    """
    device = machine.device
    copied = device.weight_copies and trip.item != trip.state_item

    def end(stage: int) -> dict[str, float]:
        again = 0.0 if trip.recomputes(stage) == "none" else device.recompute_reserve
        return _rank(trip, trip.layout.rank(pp=stage), copied) | {"reserve": device.reserve + again}

    return max(map(end, {0, trip.layout.pp - 1}), key=lambda parts: sum(parts.values()))


def _rank(trip: Trip, rank: int, copied: bool) -> dict[str, float]:
    """The categories of one rank."""
    here = trip.layout.coordinates(rank)
    sizes, sent = held(trip, here), _launches(trip, here)
    elements, word = sum(sizes.values()), trip.state_item
    share = (trip.zero_group or trip.replicas) if trip.zero else 1
    parameters = float(elements * word)
    if trip.zero:
        parameters = sum(one.size for one in sent) / (share if trip.zero == 3 else 1)
    depth = _in_flight(trip, here["pp"])
    blocks = sum(1 for name in sizes if name.endswith("norm1.weight"))
    kept = depth * blocks / trip.chunks * _activations(trip, trip.recomputes(here["pp"]))
    # Layers whose weight gradient waits keep the weight itself (`parallel.weight_gradients`).
    waits = trip.schedule == "zero-bubble" and trip.layout.pp > 1
    copies = float(trip.item * sum(_matrices(sizes).values())) if copied and not waits else 0.0
    kept += (depth / trip.chunks if trip.recompute == "none" else 1) * copies
    if here["pp"] < trip.layout.pp - 1:  # what was passed on is held until its gradient comes back
        kept += depth * residual(trip) * word
    table = word * float(sizes.get("embed.weight", 0))
    head_table = word * float(sizes.get("head.weight", sizes.get("embed.weight", 0)))
    working = _head(trip, head_table, copied) if here["pp"] == trip.layout.pp - 1 else 0.0
    # ZeRO 3: two blocks are whole at once, and what lies outside of all blocks.
    whole = 2 * max(one.size for one in sent) + sum(one.size for one in sent if one.outside) if trip.zero == 3 else 0.0
    gradients, early = _gradients(trip, elements * word, sent, share)
    fullest = max(
        early + kept + working + whole,
        gradients + (0.0 if sent else table),
        *(one + whole for one in _launched(trip, sent, share, kept, depth, blocks, table)),
    )
    activations = max(0.0, min(kept, fullest - gradients))
    return {
        "parameters": parameters,
        "gradients": min(gradients, fullest),
        "optimizer": 2.0 * elements * word / share,
        "activations": activations,
        "working": max(0.0, fullest - gradients - activations),
    }


@dataclass(frozen=True)
class Launch:
    """A unit of gradients that is sent to the replicas.

    Attributes:
        size: bytes of its flat buffer.
        left: blocks of the rank that the backward pass has not come to when it is complete.
        outside: whether it is of no block.
        embeds: whether the embedding is in it.
    """

    size: float
    left: int
    outside: bool
    embeds: bool


def _launches(trip: Trip, here: dict[str, int]) -> list[Launch]:
    """The units of a rank, in the order of the backward pass."""
    if trip.replicas == 1:
        return []
    order: dict[str, int] = {}
    for name in held(trip, here):
        if name.startswith("blocks."):
            order.setdefault(name.split(".")[1], len(order))
    found = []
    for _, packing in units(trip, here):
        numbers = [order[name.split(".")[1]] for name in packing.sizes if name.startswith("blocks.")]
        first = any(name.split(".")[0] in ("embed", "position") for name in packing.sizes)
        left = 0 if first else min(numbers, default=len(order))
        embeds = "embed.weight" in packing.sizes
        found.append(Launch(float(packing.total * trip.state_item), left, not numbers, embeds))
    return found[::-1] if trip.zero else found


def _gradients(trip: Trip, whole: float, sent: list[Launch], share: int) -> tuple[float, float]:
    """Bytes of gradients at the end of the backward pass, and while the last micro-batch's activations are held."""
    if not sent:
        return whole, whole if trip.accumulate > 1 else 0.0
    sizes = [one.size for one in sent]
    summed = sum(sizes) / (share if trip.zero else trip.replicas)
    # As sent and as received: the last two of the micro-batch before wait to be added until others are launched.
    early = summed + 2 * sum(sizes[-IN_FLIGHT:]) if trip.sums_often else whole
    return summed + (sum(sizes) if trip.zero == 0 else 0.0), early if trip.accumulate > 1 else 0.0


def _launched(
    trip: Trip, sent: list[Launch], share: int, kept: float, depth: float, blocks: int, table: float
) -> list[float]:
    """Bytes of gradients and activations while each unit is launched in the last micro-batch.

    The one before is on its way, as sent and as received; this one is there as gradients and flat, then flat, as
    sent, and as received. The embedding's gradient is added to that of a tied head.
    """
    many = trip.accumulate > 1 and trip.sums_often
    divisor = share if trip.zero else trip.replicas
    found = []
    for number, unit in enumerate(sent):
        before = sent[number - 1].size if number or many else 0.0
        summed = sum(one.size for one in (sent if many else sent[: number + 1])) / divisor
        gathered = sum(one.size for one in sent[: max(0, number - 1)]) if trip.zero == 0 else 0.0
        copies = 3 if unit.size > CHUNK_BYTES else 2
        # Of the micro-batch at hand what the backward pass has not come to, and a pipeline's others.
        still = kept * (depth - 1 + unit.left / max(1, blocks)) / depth
        making = max(copies * unit.size, unit.size + (table if unit.embeds else 0.0))
        found.append(still + summed + gathered + 2 * before + making)
    return found


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


def _head(trip: Trip, table: float, copied: bool) -> float:
    """Bytes of the output head and its loss: both gradients, the table's copy, and a chunk of logits."""
    shape, layout = trip.shape, trip.layout
    columns = shape.vocabulary // layout.sizes["tp_col"]
    tokens = trip.micro_batch * shape.sequence // (layout.grid * layout.tp_depth if layout.scheme != "1d" else 1)
    width = shape.width // (layout.grid if layout.scheme != "1d" else 1)
    chunk = min(tokens * columns, LOGITS if layout.tp == 1 else CHUNK_ELEMENTS)
    # Sharded ones are there in the compute type, wide, and as exponentials.
    logits = chunk * (trip.item if layout.tp == 1 else trip.item + 2 * trip.state_item)
    cast = copied or (layout.tp > 1 and trip.item != trip.state_item)
    copy = table * trip.item / trip.state_item if cast else 0.0
    return table + 3 * tokens * width * trip.state_item + max(copy + logits + table, table)
