"""Seconds of a step on a machine whose trainer was measured: the units of `bench.units` added up, rank by rank.

Ranks of one node share its cores. Where there are more ranks than cores a core runs several in turn, so that its time
is the sum of theirs, and one that waits costs nothing; with fewer, pipeline stages do wait, as the schedule's replay
says. Collectives are moved by the same cores, so none of their time hides behind computation.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log, prod

from tozan.models.arithmetic import block_matrices
from tozan.planner import traffic
from tozan.planner.books import Key, Trip, held, units
from tozan.planner.machine import Machine, Measured, Precision, Trainer
from tozan.schedules import Action, create, replay

PHASES = ("forward", "backward", "optimizer", "bubble", "communication")
"""What a step is made of here; communication is by axis, as `communication/dp`."""
NORMS, ROWS = 2, ("attn.proj", "mlp.proj", "mlp.down")
"""Norms of a block; matrices whose inputs 1D tensor parallelism splits."""
ACTIVATIONS = ("tp enter", "tp leave", "summa panel", "summa sum", "keys and values")
"""What travels in the compute type, by its name in the ledger; everything else is as wide as parameters."""


@dataclass(frozen=True)
class Work:
    """Seconds of one rank.

    Attributes:
        forward: of one block and micro-batch.
        backward: of the same, with what is computed again.
        ends: of a micro-batch's embedding and output head.
        tied: of both gradients of a micro-batch's tied embedding, on the last of several stages.
        step: of what comes once per step.
        pieces: blocks of each chunk.
    """

    forward: float
    backward: float
    ends: float
    tied: float
    step: float
    pieces: tuple[int, ...]


def trainer(machine: Machine, precision: str, trip: Trip) -> Trainer | None:
    """The units measured with as many threads as a rank has, or the nearest number; `None` if there are none."""
    threads = trip.threads or max(1, machine.cores // trip.layout.world_size)
    known = [found for found in machine.trainer if found.precision == precision]
    return min(known, key=lambda found: abs(found.threads - threads)) if known else None


def step(trip: Trip, machine: Machine, precision: Precision) -> dict[str, float]:
    """Seconds of a step by phase; they add up to the whole.

    Args:
        trip: the run.
        machine: with measured units for the precision.
        precision: compute type.

    Raises:
        ValueError: no units for this precision.
    """
    layout, cores = trip.layout, max(1, machine.cores)
    world = layout.world_size
    found = trainer(machine, precision, trip)
    if found is None:
        raise ValueError(f"{machine.name} has no measured units for {precision}")
    works = [_work(trip, found, machine, rank) for rank in range(world)]
    per_core = [works[core::cores] for core in range(min(cores, world))]
    whole = max(sum(_compute(trip, work) for work in ranks) for ranks in per_core)
    longest = max(_pipeline(trip, works), *(_turns(trip, works, core, cores) for core in range(min(cores, world))))
    slowest = max(per_core, key=lambda ranks: sum(_compute(trip, work) for work in ranks))
    # The head makes its gradients with the loss: nearly all of the ends is forward.
    forward = trip.accumulate * sum(sum(work.pieces) * work.forward + work.ends for work in slowest)
    once = max(sum(work.step for work in ranks) for ranks in per_core)
    phases = {"forward": forward, "backward": whole - forward, "optimizer": once, "bubble": longest - whole}
    return phases | _communication(trip, machine)


def _compute(trip: Trip, work: Work) -> float:
    """Seconds that a rank computes in the passes of a step."""
    return trip.accumulate * (sum(work.pieces) * (work.forward + work.backward) + work.ends + work.tied)


def _turns(trip: Trip, works: list[Work], core: int, cores: int) -> float:
    """Seconds until a core is done whose ranks take turns, one or the other always at work once a stage can begin.

    The first micro-batch passes the stages before, and the last one goes back through them.
    """
    ranks = range(core, len(works), cores)
    first = min(trip.layout.coordinates(rank)["pp"] for rank in ranks)
    before = (works[stage * trip.layout.stride("pp")] for stage in range(first))
    return sum(_compute(trip, works[rank]) for rank in ranks) + sum(
        work.pieces[0] * (work.forward + work.backward) for work in before
    )


def _pipeline(trip: Trip, works: list[Work]) -> float:
    """Seconds until the last stage is done, by the replay of the schedule; 0 without stages."""
    stages = trip.layout.pp
    if stages == 1:
        return 0.0
    schedule = create(trip.schedule, stages, trip.accumulate, trip.chunks)
    of_stage = [works[stage * trip.layout.stride("pp")] for stage in range(stages)]

    def seconds(stage: int, action: Action) -> float:
        work = of_stage[stage]
        end = stage == stages - 1 and action.chunk == trip.chunks - 1
        if action.kind == "forward":
            return work.pieces[action.chunk] * work.forward + (work.ends if end else 0.0)
        return work.pieces[action.chunk] * work.backward / (1 if action.kind == "backward" else 2)

    steps = replay(schedule, seconds)
    # A tied embedding's gradients fill the last stage's gaps, but for the last micro-batch's, which all wait for.
    last = [one for one in steps if one.stage == stages - 1]
    tied = of_stage[-1].tied
    filled = min(one.start for one in last) + sum(one.end - one.start for one in last) + (trip.accumulate - 1) * tied
    return max(filled, *(one.end for one in steps)) + tied


def _work(trip: Trip, unit: Trainer, machine: Machine, rank: int) -> Work:
    """The seconds of a rank."""
    here, shape = trip.layout.coordinates(rank), trip.shape
    forward, backward, again = _block(trip, unit, trip.recomputes(here["pp"]))
    ends, tied, last = 0.0, 0.0, trip.layout.pp - 1
    tokens, columns = _tokens(trip), shape.vocabulary // trip.layout.sizes["tp_col"]
    width = shape.width // (trip.layout.grid if trip.layout.scheme != "1d" else 1)
    table = _dot(unit.embedding, tokens * width, columns * width, 1)
    loss = (unit.sharded_head if trip.layout.tp > 1 else None) or unit.head
    head = _dot(loss, 6.0 * tokens * shape.width * columns, tokens * columns, columns * width, 1)
    if here["pp"] == 0:
        ends += table
    if here["pp"] == last:
        ends += head + sum(_dot(way, tokens * width, 1) for way in _norms(trip, unit))
        if last and shape.tied:  # see `parallel.tied`: logits once more, and the table
            tied = table + 2 / 3 * head
            ends -= head / 3  # no gradient of the weight in the pass itself
    pieces = tuple(map(len, trip.pieces(here["pp"])))
    slow = _slowdown(machine, trip.layout.world_size)
    once = _once(trip, unit, machine, here)
    return Work(slow * forward, slow * (backward + again), slow * ends, slow * tied, once, pieces)


def _slowdown(machine: Machine, world: int) -> float:
    """What ranks lose that share a core, beside taking turns."""
    known = machine.crowding if world > machine.cores else ()
    return min(known, key=lambda one: abs(one.ranks - world)).slowdown if known else 1.0


def _once(trip: Trip, unit: Trainer, machine: Machine, here: dict[str, int]) -> float:
    """Seconds of the optimizer, and of packing gradients for the wire: each is read and written once."""
    elements = sum(held(trip, here).values())
    share = (trip.zero_group or trip.replicas) if trip.zero else 1
    packed = 0.0
    if trip.replicas > 1:
        often = trip.accumulate if trip.sums_often else 1
        moved = sum(packing.total for _, packing in units(trip, here)) * trip.state_item
        packed = often * 2 * moved / machine.device.bandwidth * max(1, min(machine.cores, trip.layout.world_size))
    return unit.optimizer[0] * elements / share + packed


def _tokens(trip: Trip) -> int:
    """Tokens of a micro-batch on one rank: rings split sequences, grids of 2D and 2.5D split samples."""
    tokens = trip.micro_batch * trip.tokens
    return tokens if trip.layout.scheme == "1d" else tokens // (trip.layout.grid * trip.layout.tp_depth)


def _block(trip: Trip, unit: Trainer, recompute: str) -> tuple[float, float, float]:
    """Seconds of one block for one micro-batch: forward, backward, and what recomputation repeats."""
    shape, layout = trip.shape, trip.layout
    tokens, parts = _tokens(trip), layout.sizes["tp_col"]
    grid = layout.grid if layout.scheme != "1d" else 0
    forward, backward = 0.0, 0.0
    ways = unit.linear_forward, unit.linear_backward
    if grid and unit.grid_forward and unit.grid_backward:
        ways = unit.grid_forward, unit.grid_backward
    for name, (outputs, inputs) in block_matrices(shape).items():
        row = name in ROWS
        i = inputs // parts if grid or row else inputs
        o = outputs // parts if grid or not row else outputs
        terms = 2.0 * tokens * i * o, i * o, tokens * (i + o), 1
        forward += max(1, grid) * _dot(ways[0], *terms)
        backward += max(1, grid) * _dot(ways[1], *terms)
    stream = tokens * shape.width // (layout.tp if trip.sequence_parallel else max(1, grid))
    inner = tokens * shape.mlp_width // parts
    gated = shape.family == "llama"
    norm, norm_back = (_dot(way, stream, 1) for way in _norms(trip, unit))
    act = _dot(unit.swiglu_forward if gated else unit.gelu_forward, inner, 1)
    act_back = _dot(unit.swiglu_backward if gated else unit.gelu_backward, inner, 1)
    attention = _attention(trip, unit, tokens, parts)
    forward += NORMS * norm + act + attention[0]
    backward += NORMS * norm_back + act_back + attention[1]
    light = (1 if gated else 2) * norm + act
    again = {"none": 0.0, "selective": light, "full": forward}[recompute]
    return forward, backward, again


def _norms(trip: Trip, unit: Trainer) -> tuple[tuple[float, float], tuple[float, float]]:
    """Coefficients of a norm, forward and backward: of LLaMA's own if they were measured."""
    if trip.shape.family == "llama" and unit.rms_forward and unit.rms_backward:
        return unit.rms_forward, unit.rms_backward
    return unit.norm_forward, unit.norm_backward


def _rotary(trip: Trip, unit: Trainer, rows: float) -> tuple[float, float]:
    """Seconds of turning queries and keys in one call, forward and backward; `rows`: heads of tokens of the queries."""
    if trip.shape.family != "llama" or not (unit.rotary_forward and unit.rotary_backward):
        return 0.0, 0.0
    elements = rows * (1 + trip.shape.kv_heads / trip.shape.heads) * trip.shape.head_size
    return _dot(unit.rotary_forward, elements, 1), _dot(unit.rotary_backward, elements, 1)


def _attention(trip: Trip, unit: Trainer, tokens: int, parts: int) -> tuple[float, float]:
    """Seconds of one micro-batch's attention, forward and backward: in one piece, or in a ring.

    A step of the ring costs what the first does, whatever its place in the sequence (`parallel.context`).
    """
    shape, steps = trip.shape, trip.layout.cp
    rows = tokens * shape.heads / parts
    scores, elements, samples = rows * trip.tokens / 2, rows * shape.head_size, tokens / trip.tokens
    terms = 4.0 * scores * shape.head_size, scores, elements, samples
    ways = unit.attention_forward, unit.attention_backward
    if steps > 1 and unit.ring_forward and unit.ring_backward:
        ways = unit.ring_forward, unit.ring_backward
    turned = _rotary(trip, unit, rows)
    forward, backward = (steps * _dot(way, *terms) for way in ways)
    return forward + turned[0], backward + turned[1]


def _communication(trip: Trip, machine: Machine) -> dict[str, float]:
    """Seconds of every axis' operations on the rank that sends most."""
    found: dict[str, float] = {}
    for rank in range(trip.layout.world_size):
        books = traffic.books(trip, rank)
        own: dict[str, float] = {}
        for key, calls in books.calls.items():
            phase = f"communication/{key[0]}"
            own[phase] = own.get(phase, 0.0) + _seconds(trip, machine, key, calls, books.sent[key])
        found = max(found, own, key=lambda phases: sum(phases.values()))
    return found


def _group(trip: Trip, axis: str) -> tuple[int, int]:
    """Ranks along an axis by its name in the ledger, and how far apart neighbours are."""
    if axis == "world":
        return trip.layout.world_size, 1
    if axis.startswith("dp_"):
        inside = trip.zero_group or trip.layout.dp
        apart = trip.layout.stride("dp")
        return (inside, apart) if axis == "dp_shards" else (trip.layout.dp // inside, apart * inside)
    names = [name for name in axis.split("+") if trip.layout.size(name) > 1]
    return prod(map(trip.layout.size, names)), min(map(trip.layout.stride, names), default=1)


def _seconds(trip: Trip, machine: Machine, key: Key, calls: int, sent: int) -> float:
    """Seconds of some calls that send so many bytes in all, from what was measured in the most similar groups.

    Ranks of other groups that talk at once share the cores: that is measured, or, where only one group was, reckoned.
    """
    axis, operation, name = key
    known = [one for one in machine.collectives if one.operation == operation]
    if not known:
        return calls * machine.node.latency + sent / machine.node.bandwidth
    ranks, stride = _group(trip, axis)
    world, cores = trip.layout.world_size, max(1, machine.cores)
    item = trip.item if name in ACTIVATIONS else trip.state_item

    def apart(one: Measured) -> tuple[float, ...]:
        pairs = (item, one.item), (world, one.world or one.ranks), (ranks, one.ranks), (stride, one.stride)
        return tuple(abs(log(a / b)) for a, b in pairs)

    nearest = min(known, key=apart)
    groups = world / ranks, (nearest.world or nearest.ranks) / nearest.ranks
    busy = [max(1.0, count * min(ranks, cores) / cores) for count in groups]
    return busy[0] / busy[1] * (calls * nearest.latency + sent / nearest.rate)


def _dot(coefficients: tuple[float, ...], *terms: float) -> float:
    return sum(a * b for a, b in zip(coefficients, terms, strict=True))
