"""Where this rank's tensors belong in the global ones, as boxes; and which it writes when others hold the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod

from torch import Tensor

from tozan import layout
from tozan.checkpoint import Box, Pieces
from tozan.comm import Mesh
from tozan.parallel.placement import Placement

LEAST_BYTES = 1 << 20
"""Replicas share the writing of a tensor in parts of at least this size; smaller ones go round among the replicas."""


def boxes(tensor: Tensor, start: int, placement: Placement) -> Iterator[Box]:
    """The boxes of a global tensor that a stretch of this rank's piece of it is made of.

    Args:
        tensor: contiguous; elements `start` to `start + n` of the flattened piece, in any shape.
        start: first element.
        placement: where the piece belongs.

    Yields:
        Boxes whose tensors are views of `tensor`.
    """
    flat, done = tensor.detach().view(-1), 0
    for offset, size in layout.rectangles(placement.local_shape, start, start + tensor.numel()):
        local = Box(offset, flat[done : done + prod(size)].view(size))
        done += prod(size)
        for whole, piece in placement.boxes():
            at = [part.start for part in piece]
            both = local.overlap(at, [part.stop - part.start for part in piece])
            if both is not None:
                view, inside = both
                yield Box(tuple(w.start + i.start for w, i in zip(whole, inside, strict=True)), view)


def replica(placement: Placement, mesh: Mesh, among: tuple[int, int]) -> tuple[int, int]:
    """This rank's number among the ranks that hold the same elements, and how many they are.

    Args:
        placement: of the parameter.
        mesh: the ranks.
        among: the same among the data-parallel ranks only.
    """
    number, count = among
    for axis in placement.replicated_over:
        # Of a pipeline's stages only the first and the last hold the same: a tied embedding.
        size, index = (2, min(mesh["pp"].index, 1)) if axis == "pp" else (mesh[axis].size, mesh[axis].index)
        number, count = number * size + index, count * size
    return number, count


def held(
    tensors: Mapping[str, Tensor], starts: Mapping[str, int], placements: Mapping[str, Placement]
) -> dict[str, Pieces]:
    """All that this rank holds of some global tensors.

    Args:
        tensors: by parameter; each a stretch of the flattened piece.
        starts: where the stretches start.
        placements: where the pieces belong.
    """
    return {
        name: Pieces(placements[name].global_shape, tensor.dtype, tuple(boxes(tensor, starts[name], placements[name])))
        for name, tensor in tensors.items()
    }


def shared_out(
    tensors: Mapping[str, Tensor],
    starts: Mapping[str, int],
    placements: Mapping[str, Placement],
    replicas: Mapping[str, tuple[int, int]],
    numbers: Mapping[str, int],
) -> dict[str, Pieces]:
    """What this rank writes of some global tensors, so that all ranks together write each element once.

    Args:
        tensors: see `held`.
        starts: see `held`.
        placements: see `held`.
        replicas: (this one's number, how many hold the same), by parameter.
        numbers: of the parameters in the whole model: who begins with a tensor goes round.
    """
    parts, begin = {}, {}
    for name, tensor in tensors.items():
        number, count = replicas[name]
        row = prod(placements[name].local_shape[1:])
        least = LEAST_BYTES // tensor.element_size()
        first, end = layout.share(tensor.numel(), row, (number + numbers[name]) % count, count, least)
        parts[name], begin[name] = tensor.detach().view(-1)[first:end], starts[name] + first
    return held(parts, begin, placements)
