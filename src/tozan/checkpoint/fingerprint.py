"""A hash of tensors that adds up: that of a whole is the sum of those of its boxes, however it was cut.

Every element's bits, read as an unsigned number x, are multiplied by a key for its place in the *global* tensor and
added up modulo 2^64, in `LANES` independent lanes:

    sum = Σ x[i, j, …] · key(0, i) · key(1, j) · …          key(dim, i) = high[dim][i ÷ 4096] · low[dim][i mod 4096]

So ranks that hold boxes of a tensor need to send each other nothing but their sums, and the layout does not show. The
tables of odd 64-bit keys are the output of SHAKE-128, the same for ever and everywhere. One changed element is always
found; a change of several goes unseen by chance with a probability of about 2^-28 per lane if only sign bits differ,
and 2^-60 otherwise (multilinear hashing, Carter and Wegman 1979, over products of keys). This finds accidents and
differences between runs; it is no shield against a forger, for which files have their SHA-256.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LANES = 2
DIGITS = 16 * LANES
"""Hexadecimal digits of a sum."""

_TABLE = 4096
_AT_ONCE = 1 << 16
"""Elements widened to 64 bits at once: they stay in a core's cache."""

Sum = NDArray[np.uint64]
"""One number per lane."""


def zero() -> Sum:
    """The sum of nothing."""
    return np.zeros(LANES, np.uint64)


def of(block: Tensor, offset: Sequence[int]) -> Sum:
    """The sum over one box.

    Args:
        block: its values; contiguous, on the CPU.
        offset: where it starts in the global tensor.
    """
    words, offset = _words(block), list(offset) or [0]
    offset[-1] *= max(1, block.element_size() // 4)
    rows = words.reshape(-1, words.shape[-1]) if words.size else words.reshape(0, 1)
    columns = _keys(len(offset) - 1, offset[-1], rows.shape[1])
    row_keys = np.ones((LANES, 1), np.uint64)
    for dim, size in enumerate(words.shape[:-1]):
        row_keys = (row_keys[:, :, None] * _keys(dim, offset[dim], size)[:, None, :]).reshape(LANES, -1)
    total, step = zero(), max(1, _AT_ONCE // rows.shape[1])
    for start in range(0, len(rows), step):
        wide = rows[start : start + step].astype(np.uint64)
        row_sums = np.einsum("rc,lc->lr", wide, columns)
        total += (row_sums * row_keys[:, start : start + step]).sum(axis=1, dtype=np.uint64)
    return total


def text(total: Sum) -> str:
    """A sum as it stands in a manifest."""
    return "".join(f"{int(lane):016x}" for lane in total)


def parse(digits: str) -> Sum:
    """The sum that `text` wrote."""
    return np.array([int(digits[at : at + 16], 16) for at in range(0, DIGITS, 16)], np.uint64)


def _words(block: Tensor) -> NDArray[Any]:
    """The bits as unsigned numbers of at most 32 bits, so that keys of 64 see each of them; at least one dim.

    A difference in the top bit of a 64-bit number would be lost to every second one like it: they count as two.
    """
    raw = block.detach().reshape(-1).view(torch.uint8).numpy()
    size = min(4, block.element_size())
    shape = tuple(block.shape) or (1,)
    return raw.view(f"<u{size}").reshape(*shape[:-1], shape[-1] * (block.element_size() // size))


def _keys(dim: int, start: int, count: int) -> NDArray[np.uint64]:
    """Keys (LANES, count) of some places along a dim."""
    first, end = start // _TABLE, -(-(start + count) // _TABLE)
    high = _table(f"high {dim}", 1 << max(0, end - 1).bit_length())[:, first:end, None]
    keys = (high * _table(f"low {dim}", _TABLE)[:, None]).reshape(LANES, -1)
    return keys[:, start - first * _TABLE :][:, :count]


@lru_cache(maxsize=64)
def _table(name: str, count: int) -> NDArray[np.uint64]:
    """Odd numbers (LANES, count) from SHAKE-128, whose longer outputs begin with the shorter ones."""
    stream = hashlib.shake_128(f"tozan state {name}".encode()).digest(8 * LANES * count)
    return np.ascontiguousarray(np.frombuffer(stream, "<u8").reshape(count, LANES).T) | np.uint64(1)
