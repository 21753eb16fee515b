"""Layouts by the thousand: one numpy array per property, so that all are priced at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tozan.layout import Layout, Scheme

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Recompute = Literal["none", "selective", "full"]

RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")
OFFLOAD = ("none", "ram", "nvme")


@dataclass(frozen=True)
class Candidates:
    """Layouts to price; every field is an array of the same length (or of length 1, for all).

    Attributes:
        pp: pipeline stages.
        dp: data-parallel replicas.
        cp: ranks that share a sequence.
        tp: ranks that share each matrix.
        grid: side q of the 2D or 2.5D tensor-parallel grid; 0 for the 1D scheme.
        depth: grids of the 2.5D scheme (1 otherwise).
        micro_batch: samples of one forward pass.
        chunks: model pieces per stage (interleaved 1F1B above 1).
        zero: ZeRO stage.
        recompute: index into `RECOMPUTE`.
        sequence_parallel: 1 if norms and residuals are split along the sequence over `tp` (1D scheme).
        zero_bubble: 1 for the ZB-H1 schedule.
        offload: index into `OFFLOAD`: where the optimizer's state lives.
    """

    pp: Ints
    dp: Ints
    cp: Ints
    tp: Ints
    grid: Ints
    depth: Ints
    micro_batch: Ints
    chunks: Ints
    zero: Ints
    recompute: Ints
    sequence_parallel: Ints
    zero_bubble: Ints
    offload: Ints

    def __len__(self) -> int:
        sizes = [len(getattr(self, item.name)) for item in fields(self)]
        return max(sizes) if min(sizes) else 0

    @property
    def ranks(self) -> Ints:
        """World size of each."""
        return self.pp * self.dp * self.cp * self.tp

    def pick(self, index: Any) -> Candidates:
        """Those at `index` (an index array or a mask)."""
        size = len(self)
        return Candidates(*(np.broadcast_to(getattr(self, item.name), size)[index] for item in fields(self)))

    def layout(self, index: int) -> Layout:
        """The mesh of one."""
        one = self.one(index)
        scheme: Scheme = "1d" if not one["grid"] else "2d" if one["depth"] == 1 else "2.5d"
        return Layout(one["pp"], one["dp"], one["cp"], one["tp"], scheme, one["depth"])

    def one(self, index: int) -> dict[str, int]:
        """All properties of one as plain integers."""
        size = len(self)
        return {item.name: int(np.broadcast_to(getattr(self, item.name), size)[index]) for item in fields(self)}

    def __iter__(self) -> Iterator[dict[str, int]]:
        return (self.one(index) for index in range(len(self)))


def candidates(**values: Any) -> Candidates:
    """Candidates from integers or arrays; what is left out is 1 (or 0 for switches and stages).

    `recompute` and `offload` take their names, too.
    """
    ones = {"pp", "dp", "cp", "tp", "depth", "micro_batch", "chunks"}
    arrays = {}
    for item in fields(Candidates):
        value = values.pop(item.name, 1 if item.name in ones else 0)
        if isinstance(value, str):
            value = (RECOMPUTE if item.name == "recompute" else OFFLOAD).index(value)
        arrays[item.name] = np.atleast_1d(np.asarray(value, dtype=np.int64))
    if values:
        raise TypeError(f"unknown properties: {', '.join(values)}")
    return Candidates(**arrays)


def join(parts: list[Candidates]) -> Candidates:
    """All candidates of all parts, in order."""
    columns = {}
    for item in fields(Candidates):
        columns[item.name] = np.concatenate([np.broadcast_to(getattr(part, item.name), len(part)) for part in parts])
    return replace(parts[0], **columns)
