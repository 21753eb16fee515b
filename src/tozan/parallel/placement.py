"""Which part of every parameter a rank holds, under a name and a global shape that no layout changes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, product

from torch import Tensor

from tozan.layout import Indices

Box = tuple[slice, ...]
"""A rectangular part of a tensor: one slice per dim."""


@dataclass(frozen=True)
class Placement:
    """Where a rank's piece of a parameter comes from in the whole.

    Attributes:
        global_shape: shape of the whole parameter.
        indices: for every dim the ranges of indices held here, in the order in which they are stored. One range,
            but three for the rows of a fused [q; k; v].
        replicated_over: mesh axes along which every rank holds this same piece.
        partial_over: those of them along which a backward pass leaves each rank with a part of the gradient only;
            the parts are summed once per step (`tensor.synchronize`).
    """

    global_shape: tuple[int, ...]
    indices: tuple[Indices, ...]
    replicated_over: tuple[str, ...] = ()
    partial_over: tuple[str, ...] = ()

    @classmethod
    def whole(cls, shape: tuple[int, ...], *axes: str) -> Placement:
        """Everything, on every rank along `axes`."""
        return cls(tuple(shape), tuple((range(length),) for length in shape), axes)

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of the piece."""
        return tuple(sum(map(len, ranges)) for ranges in self.indices)

    def boxes(self) -> Iterator[tuple[Box, Box]]:
        """Pairs (box in the whole parameter, box in the piece) that together make up the piece."""
        dims = []
        for ranges in self.indices:
            ends = accumulate(map(len, ranges))
            dims.append(
                [
                    (slice(found.start, found.stop), slice(end - len(found), end))
                    for found, end in zip(ranges, ends, strict=True)
                ]
            )
        for pairs in product(*dims):
            yield tuple(whole for whole, _ in pairs), tuple(piece for _, piece in pairs)

    def take(self, whole: Tensor) -> Tensor:
        """The piece of a whole parameter, copied.

        Raises:
            ValueError: `whole` has another shape.
        """
        self._check("parameter", tuple(whole.shape), self.global_shape)
        piece = whole.new_empty(self.local_shape)
        for source, target in self.boxes():
            piece[target] = whole[source]
        return piece

    def put(self, piece: Tensor, whole: Tensor) -> None:
        """Write the piece to its place in a whole parameter.

        Raises:
            ValueError: `piece` or `whole` has another shape.
        """
        self._check("parameter", tuple(whole.shape), self.global_shape)
        self._check("piece", tuple(piece.shape), self.local_shape)
        for target, source in self.boxes():
            whole[target] = piece[source]

    @staticmethod
    def _check(what: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
        if found != expected:
            raise ValueError(f"a {what} of shape {found} where the placement says {expected}")
