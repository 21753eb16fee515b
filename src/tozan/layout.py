"""How a run is split: mesh axes, ranks and shards, as arithmetic on integers.

The trainer executes this and the planner prices it: both ask the same functions how large a shard is. Nothing here
communicates or allocates; a layout of 158,976 ranks costs as much as one of 8.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import isqrt, prod
from typing import Literal

Scheme = Literal["1d", "2d", "2.5d"]
Role = Literal["vocab", "position", "norm", "qkv", "col", "row"]
Indices = tuple[range, ...]
"""Which indices of one dim a rank holds, as ranges in the order in which it stores them."""

AXES = ("pp", "dp", "cp", "tp_depth", "tp_row", "tp_col")
"""The mesh axes, outermost first: neighbours along the last are neighbouring ranks, so tensor parallelism, which talks
most, stays inside a node for as long as it fits."""


@dataclass(frozen=True)
class Layout:
    """Sizes of the mesh axes.

    Attributes:
        pp: pipeline stages.
        dp: data-parallel replicas.
        cp: ranks that share a sequence (context parallelism).
        tp: ranks that share each matrix (tensor parallelism).
        scheme: how they share it: `1d` (Megatron, arXiv 1909.08053), `2d` (SUMMA on a q×q grid, arXiv 2104.05343) or
            `2.5d` (Tesseract, arXiv 2105.14500: `tp_depth` grids of q×q).
        tp_depth: grids of the 2.5D scheme.
    """

    pp: int = 1
    dp: int = 1
    cp: int = 1
    tp: int = 1
    scheme: Scheme = "1d"
    tp_depth: int = 1

    def __post_init__(self) -> None:
        for name in ("pp", "dp", "cp", "tp", "tp_depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"layout: {name} = {getattr(self, name)}, must be ≥ 1")
        if self.scheme != "2.5d" and self.tp_depth != 1:
            raise ValueError(f"layout: tp_depth = {self.tp_depth} belongs to scheme 2.5d, not {self.scheme}")
        if self.scheme != "1d" and self.tp_depth * self.grid**2 != self.tp:
            raise ValueError(f"layout: tp = {self.tp} is not tp_depth {self.tp_depth} × q² for any whole q")

    @property
    def grid(self) -> int:
        """Side q of the tensor-parallel grid (2D and 2.5D)."""
        return isqrt(self.tp // self.tp_depth)

    @property
    def sizes(self) -> dict[str, int]:
        """Size of every axis of `AXES`, in that order; the 1D scheme lies along `tp_col`."""
        rows, columns = (1, self.tp) if self.scheme == "1d" else (self.grid, self.grid)
        tensor = {"tp_depth": self.tp_depth, "tp_row": rows, "tp_col": columns}
        return {"pp": self.pp, "dp": self.dp, "cp": self.cp} | tensor

    @property
    def world_size(self) -> int:
        """Ranks of the whole run."""
        return self.pp * self.dp * self.cp * self.tp

    def size(self, axis: str) -> int:
        """Ranks along an axis; `tp` stands for its three axes together.

        Raises:
            ValueError: no such axis.
        """
        return prod(self.sizes[name] for name in _names(axis))

    def stride(self, axis: str) -> int:
        """How far apart in rank numbers two neighbours along an axis are.

        Raises:
            ValueError: no such axis.
        """
        last = AXES.index(_names(axis)[-1])
        return prod(self.sizes[name] for name in AXES[last + 1 :])

    def coordinates(self, rank: int) -> dict[str, int]:
        """Where a rank sits, along every axis of `AXES`.

        Raises:
            ValueError: the rank is not one of this layout's.
        """
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is not one of the {self.world_size} of {self}")
        found = {}
        for axis, size in reversed(self.sizes.items()):
            rank, found[axis] = divmod(rank, size)
        return {axis: found[axis] for axis in AXES}

    def rank(self, **coordinates: int) -> int:
        """The rank at these coordinates; axes left out are 0, `tp` is the index inside all of tensor parallelism.

        Raises:
            ValueError: an unknown axis, or a coordinate outside it.
        """
        number = 0
        for axis, index in coordinates.items():
            if not 0 <= index < self.size(axis):
                raise ValueError(f"{axis} = {index} is outside the axis, which has {self.size(axis)} ranks")
            number += index * self.stride(axis)
        return number

    def group(self, rank: int, *axes: str) -> tuple[int, ...]:
        """The ranks, ascending, that differ from `rank` only along `axes`: those it talks to there, itself included.

        Raises:
            ValueError: no such rank or axis.
        """
        moving = [name for axis in axes for name in _names(axis)]
        still = {axis: index for axis, index in self.coordinates(rank).items() if axis not in moving}
        base = self.rank(**still)
        offsets = product(*(range(0, self.sizes[name] * self.stride(name), self.stride(name)) for name in moving))
        return tuple(sorted(base + sum(offset) for offset in offsets))

    def groups(self, *axes: str) -> Iterator[tuple[int, ...]]:
        """All groups along `axes`, in the order of their first ranks: every rank is in exactly one.

        Every process must create all groups in the same order; this is that order.
        """
        moving = {name for axis in axes for name in _names(axis)}
        for rank in range(self.world_size):
            coordinates = self.coordinates(rank)
            if not any(coordinates[axis] for axis in moving):
                yield self.group(rank, *axes)


def _names(axis: str) -> tuple[str, ...]:
    """The axes that a name stands for."""
    if axis == "tp":
        return AXES[3:]
    if axis not in AXES:
        raise ValueError(f"no mesh axis {axis!r}; there are {', '.join(AXES)} and tp")
    return (axis,)


def split(length: int, parts: int, index: int) -> range:
    """Part `index` of `length` things in `parts` parts whose sizes differ by at most one; the first are the larger.

    `torch.tensor_split` cuts the same way. A flat buffer sharded by ZeRO, a vocabulary and a matrix are all cut by
    this; parts beyond `length` are empty.

    Raises:
        ValueError: `index` is not one of the parts.
    """
    if not 0 <= index < parts:
        raise ValueError(f"part {index} of {parts}")
    small, larger = divmod(length, parts)
    start = index * small + min(index, larger)
    return range(start, start + small + (index < larger))


def split_heads(heads: int, kv_heads: int, parts: int, index: int) -> tuple[range, range]:
    """The query heads and the key/value heads of one tensor-parallel rank.

    A query head stays with the key/value head it reads. With more ranks than key/value heads, ranks share one: each
    holds a copy.

    Raises:
        ValueError: heads that cannot be split so (no whole ratio, or fewer query heads than ranks).
    """
    if heads % kv_heads or heads < parts:
        raise ValueError(f"{heads} query heads and {kv_heads} key/value heads over {parts} ranks")
    ratio = heads // kv_heads
    if parts <= kv_heads:
        keys = split(kv_heads, parts, index)
        return range(keys.start * ratio, keys.stop * ratio), keys
    if parts % kv_heads or ratio % (parts // kv_heads):
        raise ValueError(f"{parts} ranks cannot share {kv_heads} key/value heads of {ratio} query heads each evenly")
    queries = split(heads, parts, index)
    key = queries.start // ratio
    return queries, range(key, key + 1)


def split_layers(layers: int, stages: int, chunks: int = 1, sizes: Sequence[int] = ()) -> tuple[tuple[range, ...], ...]:
    """Layers of every pipeline stage: `result[stage][chunk]` is a range of block numbers.

    Where layers do not divide evenly the middle virtual stages get one more: the first holds the embedding too and the
    most activations, the last the output head and the loss. `sizes`, of every virtual stage in order, says otherwise.

    Raises:
        ValueError: fewer layers than virtual stages, or sizes that do not make up the layers.
    """
    parts = stages * chunks
    if layers < parts:
        raise ValueError(f"{layers} layers cannot fill {stages} stages × {chunks} chunks")
    small, larger = divmod(layers, parts)
    sizes = sizes or [small + ((parts - larger) // 2 <= part < (parts + larger) // 2) for part in range(parts)]
    if (len(sizes), sum(sizes)) != (parts, layers) or min(sizes) < 1:
        raise ValueError(f"{sizes} are not the layers of {stages} stages × {chunks} chunks of {layers} layers")
    ranges = [range(sum(sizes[:part]), sum(sizes[: part + 1])) for part in range(parts)]
    return tuple(tuple(ranges[chunk * stages + stage] for chunk in range(chunks)) for stage in range(stages))


def split_sequence(tokens: int, parts: int, index: int) -> tuple[range, range]:
    """The two pieces of a sequence that one context-parallel rank holds: one from each end, inwards.

    A causal token attends to all before it, so early pieces are cheap and late ones dear; an early piece with its
    mirror image costs the same on every rank (the zigzag of ring attention).
    """
    return split(tokens, 2 * parts, index), split(tokens, 2 * parts, 2 * parts - 1 - index)


def shard(
    role: Role,
    shape: Sequence[int],
    layout: Layout,
    coordinates: dict[str, int],
    heads: tuple[int, int] | None = None,
) -> tuple[Indices, ...]:
    """The indices of a parameter that a rank holds under tensor parallelism, for every dim.

    1D: `vocab`, `qkv` and `col` cut their rows (outputs), `row` its columns (inputs); `position`, `norm` and the bias
    of `row` are whole on every rank. 2D and 2.5D: matrices cut rows along `tp_col` and columns along `tp_row`,
    vectors (and the width of `position`) along `tp_col`; `tp_depth` holds copies.

    Args:
        role: what the parameter is to the scheme.
        shape: its global shape: a matrix (outputs, inputs), `vocab` (V, D), `position` (T, D), or a vector.
        layout: the mesh.
        coordinates: the rank's, as `Layout.coordinates` gives them.
        heads: query heads and key/value heads; needed for `qkv`, whose rows are [q; k; v].

    Raises:
        ValueError: heads that do not split, or `qkv` without `heads`.
    """
    columns, rows = layout.sizes["tp_col"], layout.sizes["tp_row"]
    column, row = coordinates["tp_col"], coordinates["tp_row"]
    whole = tuple((range(length),) for length in shape)
    if role == "qkv":
        if heads is None:
            raise ValueError("role qkv needs the numbers of heads")
        outputs = _qkv_rows(shape[0], heads, columns, column)
    else:
        outputs = (split(shape[0], columns, column),)
    if layout.scheme == "1d":
        if role in ("position", "norm") or (role == "row" and len(shape) == 1):
            return whole
        if role == "row":
            return whole[0], (split(shape[1], columns, column),)
        return (outputs, *whole[1:])
    if len(shape) == 1:
        return (outputs,)
    if role == "position":
        return whole[0], (split(shape[1], columns, column),)
    if role == "vocab":
        return (split(shape[0], rows, row),), (split(shape[1], columns, column),)
    return outputs, (split(shape[1], rows, row),)


def _qkv_rows(length: int, heads: tuple[int, int], parts: int, index: int) -> Indices:
    """Rows of a [q; k; v] matrix that belong to one rank's heads."""
    query, key = heads
    size, rest = divmod(length, query + 2 * key)
    if rest:
        raise ValueError(f"qkv of {length} rows is not {query} + 2 × {key} heads of equal size")
    queries, keys = split_heads(query, key, parts, index)

    def rows(first: int, chosen: range) -> range:
        return range((first + chosen.start) * size, (first + chosen.stop) * size)

    return rows(0, queries), rows(query, keys), rows(query + key, keys)


def walk(shape: Sequence[int], order: Sequence[int] = ()) -> Iterator[tuple[int, ...]]:
    """Coordinates of a grid of nodes in the order in which ranks fill it: the last dim of `order` fastest.

    Args:
        shape: sizes of the dims.
        order: the dims, slowest first; default as they come.
    """
    order = order or range(len(shape))
    for walked in product(*(range(shape[dim]) for dim in order)):
        coordinates = [0] * len(shape)
        for dim, index in zip(order, walked, strict=True):
            coordinates[dim] = index
        yield tuple(coordinates)


SEGMENT = 256
"""Neighbouring elements whose squares are added first in the gradient norm. ZeRO cuts parameters at multiples of it
only, so the sums, and with them the global norm, do not depend on where a parameter is cut."""


class Packing:
    """Where parameters lie in a flat buffer that is cut into equal shards, each a whole number of segments.

    Args:
        sizes: elements of every parameter, in order.
        shards: equal parts that the buffer is cut into.
        copies: equal parts that each shard must divide into (hybrid sharding).

    Attributes:
        sizes: as given.
        offsets: where each parameter starts: a multiple of `SEGMENT`.
        total: elements of the buffer, padding included.
        shard: elements of one shard.
    """

    def __init__(self, sizes: Mapping[str, int], shards: int, copies: int = 1) -> None:
        self.sizes, self.offsets, position = dict(sizes), {}, 0
        for name, size in sizes.items():
            self.offsets[name] = position
            position += -(-size // SEGMENT) * SEGMENT
        grain = SEGMENT * shards * copies
        self.total = -(-position // grain) * grain
        self.shard = self.total // shards

    def own(self, name: str, index: int) -> tuple[slice, slice]:
        """What shard `index` holds of a parameter: (where in the shard, where in the flattened parameter).

        Both are empty where the shard holds nothing of it.
        """
        begin, offset, size = index * self.shard, self.offsets[name], self.sizes[name]
        start, stop = max(begin, offset), min(begin + self.shard, offset + size)
        if stop <= start:
            return slice(0, 0), slice(0, 0)
        return slice(start - begin, stop - begin), slice(start - offset, stop - offset)


def bucket_names(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Neighbouring parameters in buckets of at most `limit` bytes, unless one alone is larger.

    Args:
        sizes: bytes of every parameter, in order.
        limit: bytes of a bucket.
    """
    groups: list[list[str]] = []
    room = -1
    for name, size in sizes.items():
        if size > room:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= size
    return groups


def count(indices: Sequence[Indices]) -> int:
    """Elements of a shard."""
    return prod(sum(len(part) for part in dim) for dim in indices)


def zero_bytes(
    elements: int,
    zero: int,
    ranks: int,
    parameter_bytes: float = 4,
    gradient_bytes: float = 4,
    optimizer_bytes: float = 8,
) -> dict[str, float]:
    """Bytes that the fullest rank keeps of a flat buffer under a ZeRO stage (arXiv 1910.02054).

    Stage 1 shards the optimizer's state, 2 the gradients too, 3 the parameters too; the shard is `split`'s largest.

    Args:
        elements: parameters in the buffer, after tensor and pipeline parallelism.
        zero: stage, 0 to 3.
        ranks: ranks that share (data × context parallel).
        parameter_bytes: bytes of a parameter as the forward pass reads it.
        gradient_bytes: bytes of a gradient.
        optimizer_bytes: bytes of optimizer state per parameter, a master copy included if there is one.
    """
    share = len(split(elements, ranks, 0))
    return {
        "parameters": parameter_bytes * (share if zero >= 3 else elements),
        "gradients": gradient_bytes * (share if zero >= 2 else elements),
        "optimizer": optimizer_bytes * (share if zero >= 1 else elements),
    }


def rectangles(shape: Sequence[int], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Boxes that together are the elements `start` to `stop` of a tensor in row-major order, in that order.

    A stretch of a flat buffer is no rectangle of the tensor that was flattened, but at most 2·dims - 1 of them: the end
    of a row, whole rows, the beginning of a row. Each is contiguous in the stretch.

    Yields:
        (offset, size), one number per dim; none is empty.
    """
    if stop <= start:
        return
    if not shape:
        yield (), ()
        return
    inner = prod(shape[1:])
    first, last = -(-start // inner), stop // inner
    if first > last:  # inside of one row
        for offset, size in rectangles(shape[1:], start - last * inner, stop - last * inner):
            yield (last, *offset), (1, *size)
        return
    for offset, size in rectangles(shape[1:], inner - (first * inner - start), inner if first * inner > start else 0):
        yield (first - 1, *offset), (1, *size)
    if last > first:
        yield (first, *[0] * (len(shape) - 1)), (last - first, *shape[1:])
    for offset, size in rectangles(shape[1:], 0, stop - last * inner):
        yield (last, *offset), (1, *size)


def slabs(shape: Sequence[int], limit: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cuts a tensor into contiguous boxes of at most `limit` elements, in row-major order, as few as is simple.

    Yields:
        (offset, size), one number per dim.
    """
    if not shape:
        yield (), ()
        return
    inner = prod(shape[1:])
    if inner > limit:
        for row in range(shape[0]):
            yield from (((row, *offset), (1, *size)) for offset, size in slabs(shape[1:], limit))
        return
    rows = max(1, limit // max(1, inner))
    for row in range(0, shape[0], rows):
        yield (row, *[0] * (len(shape) - 1)), (min(rows, shape[0] - row), *shape[1:])


def share(count: int, row: int, replica: int, replicas: int, least: int) -> tuple[int, int]:
    """Which of `count` elements that several replicas hold falls to one of them: each element to exactly one.

    Args:
        count: elements.
        row: elements of a row; cuts fall between rows where shares are larger than a row.
        replica: 0 ≤ replica < replicas.
        replicas: how many hold the same.
        least: smallest share worth having; the last replicas get nothing if there is not enough for all.

    Returns:
        First element and end.
    """
    shares = min(replicas, max(1, count // least))

    def cut(number: int) -> int:
        at = count * number // shares
        return at if row > count // shares or number == shares else at - at % row

    return (cut(replica), cut(replica + 1)) if replica < shares else (0, 0)
