"""Sums over many tensors on a GPU, by one kernel each: to launch one for every tensor takes longer than to read it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from tozan.ops import native

PART_WORDS = 1 << 15
"""Of the largest tensor a program reads so many words; of a small one most programs find nothing to do."""


def usable(tensors: Sequence[Tensor]) -> bool:
    """Whether the kernels take these tensors: on a GPU that there is Triton for, contiguous, of 32-bit words."""
    return (
        len(tensors) > 0
        and all(t.is_cuda and t.is_contiguous() and t.nbytes % 4 == 0 for t in tensors)
        and native.fuses_on_gpu()
    )


def checksums(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of the 64-bit words of each modulo 2⁶⁴, the last one filled up with zeros.

    Returns:
        (tensors,) int64, on the GPU.
    """
    from tozan.ops import gpu_kernels

    table = _table(tensors[0], [t.data_ptr() for t in tensors], [t.nbytes // 4 for t in tensors])
    parts = _parts(tensors)
    found = table.new_empty(len(tensors), parts)
    gpu_kernels.checksum[len(tensors), parts](*table, found, BLOCK=2048, PARTS=parts)
    return found.sum(1)


def segment_squares(tensors: Sequence[Tensor], segment: int) -> list[Tensor]:
    """The sum of squares of every `segment` neighbouring elements of each; the last segment may be short.

    Args:
        tensors: in fp32.
        segment: a power of two.

    Returns:
        (segments,) fp64 for each, on the GPU.
    """
    from tozan.ops import gpu_kernels

    counts = [-(-t.numel() // segment) for t in tensors]
    offsets = [0, *itertools.accumulate(counts)]
    table = _table(tensors[0], [t.data_ptr() for t in tensors], [t.numel() for t in tensors], offsets[:-1])
    found = table.new_empty(offsets[-1], dtype=torch.float64)
    parts = _parts(tensors)
    gpu_kernels.squares[len(tensors), parts](*table, found, SEGMENT=segment, ROWS=16, PARTS=parts)
    return list(torch.split(found, counts))


def sums(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of each, always added up in the same order.

    Args:
        tensors: (n,) fp64 each, of any lengths.

    Returns:
        (tensors,) fp64, on the GPU.
    """
    from tozan.ops import gpu_kernels

    counts = [len(t) for t in tensors]
    table = _table(tensors[0], [0, *itertools.accumulate(counts[:-1])], counts)
    together = torch.cat(list(tensors))
    found = together.new_empty(len(tensors))
    gpu_kernels.sums[len(tensors),](together, *table, found, BLOCK=1024)
    return found


def _parts(tensors: Sequence[Tensor]) -> int:
    """Programs for each tensor."""
    return min(1024, max(1, max(t.nbytes for t in tensors) // 4 // PART_WORDS))


def _table(beside: Tensor, *columns: list[int]) -> Tensor:
    """Numbers where a tensor is, (columns, tensors) int64; what is launched next waits for them, not the caller."""
    table = torch.tensor(columns, pin_memory=beside.is_cuda)
    return table.to(beside.device, non_blocking=True)
