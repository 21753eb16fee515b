"""A rank's ledger of one step, written in advance: what it holds, and each collective with the arithmetic of `wire`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from tozan import wire
from tozan.layout import Layout, Packing, Role, bucket_names, count, shard, split, split_layers
from tozan.models.arithmetic import Shape, parameter_shapes
from tozan.schedules import Name

BUCKET_BYTES = 32 << 20
"""Gradients that plain data parallelism sends together (`parallel.data`)."""
CHUNK_ELEMENTS = 1 << 24
"""Logits of sharded vocabularies that a rank makes at a time (`parallel.vocabulary`)."""
LOSSES_ITEM = 8
"""Bytes of a loss or a sum of squares, which travel in fp64."""

Key = tuple[str, str, str]
"""Mesh axis, operation and name, as in the ledger."""


@dataclass(frozen=True)
class Trip:
    """What of a run decides the bytes and the seconds of its steps.

    Attributes:
        shape: the model's sizes.
        layout: the mesh.
        micro_batch: samples of one forward pass.
        accumulate: micro-batches of one replica in one step.
        item: bytes of an activation in the compute type.
        state_item: bytes of a parameter, a gradient, a norm's or softmax's statistics: 8 in fp64, else 4.
        head_item: bytes of the logits' gradient in products (fp32 where the compute type is fp16).
        zero: ZeRO stage.
        zero_group: replicas that share state; the whole axis if None.
        deterministic: sums in the order of micro-batches.
        sequence_parallel: of the 1D scheme.
        schedule: of the pipeline.
        chunks: pieces of the model per stage.
        split: layers of each piece, if not as even as can be.
        recompute_stages: what each pipeline stage computes again, if not all the same.
        recompute: what is computed again in backward passes.
        threads: that a rank computes with; 0: its share of the cores.
    """

    shape: Shape
    layout: Layout
    micro_batch: int
    accumulate: int
    item: int = 4
    state_item: int = 4
    head_item: int = 4
    zero: int = 0
    zero_group: int | None = None
    deterministic: bool = True
    sequence_parallel: bool = False
    schedule: Name = "1f1b"
    chunks: int = 1
    recompute: str = "none"
    split: tuple[int, ...] = ()
    recompute_stages: tuple[str, ...] = ()
    threads: int = 0

    @property
    def replicas(self) -> int:
        """Ranks that hold the same part of the model and add up gradients."""
        return self.layout.dp * self.layout.cp

    @property
    def tokens(self) -> int:
        """Of a sequence, on each rank."""
        return self.shape.sequence // self.layout.cp

    @property
    def hands_over(self) -> bool:
        """Whether a pipeline hands each micro-batch's gradients to the replicas."""
        return self.layout.pp > 1 and self.replicas > 1 and self.sums_often

    @property
    def sums_often(self) -> bool:
        """Whether replicas sum every micro-batch's gradients, not only the step's."""
        return self.deterministic or self.zero >= 2

    def pieces(self, stage: int) -> tuple[range, ...]:
        """Blocks of a pipeline stage, by chunk."""
        return split_layers(self.shape.layers, self.layout.pp, self.chunks, self.split)[stage]

    def recomputes(self, stage: int) -> str:
        """What a pipeline stage computes again in backward passes."""
        return self.recompute_stages[stage] if self.recompute_stages else self.recompute

    def tied_apart(self, stage: int) -> bool:
        """Whether a tied embedding's gradient is a matter of its own on this stage."""
        return self.hands_over and self.shape.tied and stage in (0, self.layout.pp - 1)


@dataclass(frozen=True)
class Line:
    """The ranks along an axis, as one of them sees it."""

    name: str
    size: int
    index: int


class Books:
    """A rank's ledger of one step, written in advance.

    Args:
        trip: the run.
        rank: whose ledger.

    Attributes:
        sent: bytes by (axis, operation, name).
        calls: how many operations they are.
    """

    def __init__(self, trip: Trip, rank: int) -> None:
        self.trip, self.shape = trip, trip.shape
        self.sent: Counter[Key] = Counter()
        self.calls: Counter[Key] = Counter()
        self.here = trip.layout.coordinates(rank)
        self._rank = rank

    def axis(self, *names: str, label: str = "") -> Line:
        """An axis, or several joined."""
        ranks = self.trip.layout.group(self._rank, *names)
        return Line(label or "+".join(names), len(ranks), ranks.index(self._rank))

    @cached_property
    def replicas(self) -> Line:
        """Those that add up gradients."""
        return self.axis("dp", "cp") if self.trip.layout.cp > 1 else self.axis("dp")

    @property
    def recompute(self) -> str:
        """What this rank computes again in backward passes."""
        return self.trip.recomputes(self.here["pp"])

    @cached_property
    def tensor(self) -> Line:
        """All ranks of tensor parallelism."""
        return self.axis("tp")

    @cached_property
    def rows(self) -> Line:
        """Those of one column of the grid."""
        return self.axis("tp_row")

    @cached_property
    def columns(self) -> Line:
        """Those of one row of the grid."""
        return self.axis("tp_col")

    def add(self, axis: Line, operation: str, name: str, sent: int, times: int = 1, calls: int = 1) -> None:
        """Book an operation, or `calls` of them that send so much together; an axis of one rank has none."""
        if axis.size > 1:
            self.sent[axis.name, operation, name] += sent * times
            self.calls[axis.name, operation, name] += calls * times

    def all_reduce(
        self, axis: Line, name: str, elements: int, item: int, times: int = 1, ordered: bool = False
    ) -> None:
        """Sum over an axis; of 16-bit types, or in the order of the ranks, by a scatter and a gather."""
        if not ordered and item >= 4:
            self.add(axis, "all_reduce", name, wire.all_reduce(elements * item, axis.size), times)
        else:
            self.scatter(axis, name, elements, len(split(elements, axis.size, axis.index)), item, times)
            self.gather(axis, name, elements, item, times)

    def scatter(self, axis: Line, name: str, elements: int, own: int, item: int, times: int = 1) -> None:
        """Reduce-scatter of which this rank keeps `own` elements."""
        self.add(axis, "reduce_scatter", name, wire.reduce_scatter(elements * item, own * item), times)

    def gather(self, axis: Line, name: str, elements: int, item: int, times: int = 1) -> None:
        """All-gather to `elements` in all."""
        self.add(axis, "all_gather", name, wire.all_gather(elements * item, axis.size), times)

    def panels(self, axis: Line, elements: int, item: int, times: int = 1) -> None:
        """SUMMA: the blocks of all ranks along an axis, broadcast in turn."""
        sent = sum(wire.broadcast(elements * item, axis.size, (axis.index - s) % axis.size) for s in range(axis.size))
        self.add(axis, "broadcast", "summa panel", sent, times, calls=axis.size)

    def sums(self, axis: Line, elements: int, item: int, times: int = 1) -> None:
        """SUMMA: part l of a product summed onto rank l."""
        sent = elements * item * (axis.size - 1)
        self.add(axis, "reduce_scatter", "summa sum", sent, times, calls=axis.size)


def held(trip: Trip, here: dict[str, int]) -> dict[str, int]:
    """Elements of every parameter that a rank holds after tensor and pipeline parallelism, in the model's order."""
    shape, layout = trip.shape, trip.layout
    stage, last = here["pp"], here["pp"] == layout.pp - 1
    blocks = {n for piece in trip.pieces(stage) for n in piece}
    found = {}
    for name, size in parameter_shapes(shape).items():
        top = name.split(".")[0]
        if top == "blocks":
            kept = int(name.split(".")[1]) in blocks
        elif top == "embed":
            kept = stage == 0 or (last and shape.tied)
        else:
            kept = last if top in ("norm", "head") else stage == 0
        if kept:
            found[name] = count(shard(role(name), size, layout, here, (shape.heads, shape.kv_heads)))
    return found


def role(name: str) -> Role:
    """What a parameter of tozan's own models is to a tensor-parallel scheme."""
    module = name.rpartition(".")[0].rpartition(".")[2]
    known: dict[str, Role] = {"embed": "vocab", "head": "vocab", "position": "position", "qkv": "qkv"}
    known |= {"proj": "row", "down": "row", "fc": "col", "gate": "col", "up": "col"}
    return known.get(module, "norm")


def units(trip: Trip, here: dict[str, int]) -> list[tuple[str, Packing]]:
    """The flat buffers that replicas exchange: buckets of gradients, or ZeRO's units of one block each."""
    sizes, replicas, stage = held(trip, here), trip.replicas, here["pp"]
    if trip.zero == 0:
        backward = dict(reversed(sizes.items()))
        found: list[list[str]] = []
        for group in _groups(trip, backward, stage):
            found += bucket_names({name: backward[name] * trip.state_item for name in group}, BUCKET_BYTES)
        return [(f"bucket {i}", Packing({n: backward[n] for n in g}, replicas)) for i, g in enumerate(found)]
    inside = trip.zero_group or replicas
    groups_of: dict[str, dict[str, int]] = {}
    order: dict[str, int] = {}
    for name, size in sizes.items():
        if name == "embed.weight" and trip.tied_apart(stage):
            unit = name
        elif name.startswith("blocks."):
            unit = f"block {order.setdefault(name.split('.')[1], len(order))}"
        else:
            unit = "after the blocks" if order else "before the blocks"
        groups_of.setdefault(unit, {})[name] = size
    return [(unit, Packing(group, inside, replicas // inside)) for unit, group in groups_of.items()]


def _groups(trip: Trip, names: Iterable[str], stage: int) -> list[list[str]]:
    """Parameters whose gradients go together: all, or those of one chunk of a pipeline stage."""
    if not trip.hands_over:
        return [list(names)]
    chunk_of = {number: chunk for chunk, piece in enumerate(trip.pieces(stage)) for number in piece}
    found: list[list[str]] = [[] for _ in range(trip.chunks + 1)]
    for name in names:
        top, rest = name.split(".", 1)
        if top == "embed" and trip.tied_apart(stage):
            found[-1].append(name)
        elif top == "blocks":
            found[chunk_of[int(rest.split(".")[0])]].append(name)
        else:
            found[trip.chunks - 1 if top in ("norm", "head") else 0].append(name)
    return found


def residual(trip: Trip) -> int:
    """Elements of a rank's part of the residual stream of one micro-batch."""
    layout = trip.layout
    elements = trip.micro_batch * trip.tokens * trip.shape.width
    if layout.scheme != "1d":
        return elements // (layout.grid * layout.tp_depth) // layout.grid
    return elements // layout.tp if trip.sequence_parallel else elements
