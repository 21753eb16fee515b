"""Bits at rest: a checksum of every tensor after the optimizer's step, compared before the next one.

Between two updates nothing may write into weights and optimizer state, so a checksum taken right after an update and
again right before the next one differs only if memory changed by itself. The rank that sees it is the rank that has
it: no majority is needed, and sharded state and single processes are covered as well. Where several ranks hold the
same piece (`Held.axes`), their checksums must also agree: they do not if one of them computed or received something
else. One word per mesh axis and rank is enough to see that (`Watch.words`), and is what travels.

A checksum is the sum of a tensor's 64-bit words modulo 2⁶⁴ (`ops.checksums`). What the optimizer writes it sums as it
writes it, so that only the second one reads memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tozan.layout import AXES
from tozan.ops.update import WORD, checksum_words
from tozan.optim.adamw import AdamW
from tozan.train.split import Split

MIX = 0x9E3779B97F4A7C15
"""An odd number (2⁶⁴ over the golden ratio): multiples of it tell the places of tensors apart."""
TURNS = 10
"""Steps in which a rotating watch has seen everything."""


@dataclass(frozen=True)
class Held:
    """A tensor that must keep its bits between two updates.

    Attributes:
        name: `model/<parameter>` or `optimizer/<slot>/<parameter>`, as in a checkpoint, or `buffer/<name>`.
        tensor: the live one.
        axes: mesh axes of more than one rank along which every rank has the same bits.
        written: what `AdamW.step` calls it, if the optimizer is the last to write it.
    """

    name: str
    tensor: Tensor
    axes: tuple[str, ...]
    written: str = ""


def held(split: Split, optimizer: AdamW) -> list[Held]:
    """Everything of a rank that rests between two updates."""
    sync = split.sync
    pieces = {f"model/{name}": (name, p.detach(), sync.whole_at_rest) for name, p in sync.resting.items()}
    for key, tensor in optimizer.tensors().items():
        pieces[f"optimizer/{key}"] = key.partition("/")[2], tensor, sync.whole_state
    written = {f"optimizer/{key}": key for key in optimizer.tensors()}
    for name, parameter in sync.resting.items():
        if optimizer.parameters.get(name) is parameter:  # it steps slices of what ZeRO 1 and 2 then gather
            written[f"model/{name}"] = f"parameter/{name}"
    found = []
    for key, (name, tensor, whole) in pieces.items():
        axes = split.placements[name].replicated_over
        # Slices of a tied embedding are not cut alike on its two stages, whose units hold other parameters beside it.
        axes = (*axes, "dp", "cp") if whole else tuple(axis for axis in axes if axis != "pp")
        axes = tuple(axis for axis in axes if split.mesh.layout.sizes[axis] > 1)
        found.append(Held(key, tensor, axes, written.get(key, "")))
    found += [Held(f"buffer/{name}", buffer, ()) for name, buffer in split.model.named_buffers()]
    return [piece for piece in found if piece.tensor.numel()]


def combine(sums: Sequence[int], places: Sequence[int]) -> int:
    """One word of many: any single change of a sum changes it. Never 0, which stands for nothing."""
    return sum(value * (MIX * (2 * place + 1) % WORD) for value, place in zip(sums, places, strict=True)) % WORD or 1


def signed(word: int) -> int:
    """The number of 64 bits with a sign that has the bits of a word below 2⁶⁴."""
    return word - WORD if word >= WORD // 2 else word


class Watch:
    """Checksums of everything held, taken after an update and compared before the next.

    Args:
        pieces: what to watch.
        turns: watch only every `turns`-th part of the memory at a time, another one after every update; 1: all.
    """

    # Checksums stay where they are made until someone wants to see them: to wait for a GPU costs more than they do.

    def __init__(self, pieces: Sequence[Held], turns: int = 1) -> None:
        self.pieces = list(pieces)
        self._turns = list(_deal([p.tensor.numel() * p.tensor.element_size() for p in self.pieces], turns))
        self._copies = {axis: [n for n, piece in enumerate(self.pieces) if axis in piece.axes] for axis in AXES}
        self._kept: Tensor | None = None
        self._found: Tensor | None = None
        self._watched: list[int] = []

    @property
    def fresh(self) -> bool:
        """Whether nothing is kept to compare with."""
        return self._kept is None

    @property
    def words(self) -> list[int]:
        """One for each of `AXES`, of the kept checksums of what is replicated along it; 0 where nothing is."""
        return [combine(list(sums.values()), list(sums)) if sums else 0 for sums in map(self.along, AXES)]

    def keep(self, step: int, written: Mapping[str, int] | None = None) -> None:
        """Right after an update: take the checksums of this step's turn, but for those that `AdamW.step` returned."""
        self._watched = self._turns[step % len(self._turns)]
        self._kept = self._now(written or {})

    def forget(self) -> None:
        """Something wrote into the tensors on purpose (a checkpoint was loaded): compare with nothing."""
        self._kept = self._found = None

    def look(self) -> None:
        """On a GPU, which is not waited for: take the checksums that the next `changed` tells of."""
        self._found = self._now({}) if self._kept is not None and self._kept.is_cuda else None

    def changed(self) -> list[str]:
        """Right before an update: names of the tensors whose bits are not those kept."""
        if self._kept is None:
            return []
        found, self._found = self._now({}) if self._found is None else self._found, None
        if torch.equal(found, self._kept):
            return []
        different = (found != self._kept).tolist()
        return [self.pieces[n].name for n, changed in zip(self._watched, different, strict=True) if changed]

    def along(self, axis: str) -> dict[int, int]:
        """Kept checksums of what is replicated along an axis, by the piece's number among those that are."""
        if self._kept is None or not self._copies[axis]:
            return {}
        kept = dict(zip(self._watched, (value % WORD for value in self._kept.tolist()), strict=True))
        return {place: kept[number] for place, number in enumerate(self._copies[axis]) if number in kept}

    def name_along(self, axis: str, place: int) -> str:
        """Name of a piece by its number in `along`."""
        return self.pieces[self._copies[axis][place]].name

    def _now(self, known: Mapping[str, int]) -> Tensor:
        pieces = [self.pieces[number] for number in self._watched]
        words = checksum_words([piece.tensor for piece in pieces if piece.written not in known])
        if not known:
            return words
        read = iter(words.tolist())
        values = [known[piece.written] if piece.written in known else next(read) for piece in pieces]
        return torch.tensor([signed(value) for value in values])


def _deal(sizes: Sequence[int], turns: int) -> Iterator[list[int]]:
    """Numbers of neighbouring pieces in at most `turns` groups of about equal size."""
    groups: list[list[int]] = [[] for _ in range(turns)]
    total, seen = sum(sizes), 0
    for number, size in enumerate(sizes):
        groups[min(turns - 1, seen * turns // max(total, 1))].append(number)
        seen += size
    yield from groups


def dissenters(words: np.ndarray, sizes: Sequence[int], axis: int) -> list[tuple[list[int], bool]]:
    """Groups of ranks along an axis that should have the same word and do not.

    Args:
        words: (world,) one per rank; 0 means that the rank holds nothing to compare.
        sizes: of all mesh axes, outermost first.
        axis: which of them.

    Returns:
        For each such group: (the ranks outside of its majority, True), or (all its ranks, False) without a majority.
    """
    lines = np.moveaxis(words.reshape(sizes), axis, -1).reshape(-1, sizes[axis])
    ranks = np.moveaxis(np.arange(words.size).reshape(sizes), axis, -1).reshape(-1, sizes[axis])
    found = []
    for line, members in zip(lines, ranks, strict=True):
        values, counts = np.unique(line[line != 0], return_counts=True)
        if len(values) < 2:
            continue
        majority = values[counts.argmax()] if counts.max() * 2 > counts.sum() else None
        guilty = members[(line != 0) & (line != majority)] if majority is not None else members[line != 0]
        found.append((guilty.tolist(), majority is not None))
    return found
