"""What happens to the state of training between two steps: AdamW's update and checksums, for many tensors in one call.

The update reads parameter, gradient and both moments once, writes three of them once, and sums the words that it
writes on the way: a checksum right after an update costs no reading of its own.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from tozan.ops import many, native

WORD = 1 << 64


@dataclass(frozen=True)
class Rates:
    """The numbers of an AdamW update.

    Attributes:
        lr: learning rate.
        beta1: share of the old first moment that stays.
        beta2: share of the old second moment that stays.
        eps: added to the root of the second moment.
        decay: weight decay, of the learning rate.
        updates: how many there will have been with this one.
        scale: what gradients are multiplied by.
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    decay: float
    updates: int
    scale: float = 1.0


class _Step(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_float) for name in ("scale", "shrink", "first", "second", "rest", "correction", "eps", "size")
    )


def adamw_reference(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    rates: Rates,
) -> None:
    """What `adamw` does, by PyTorch's own function; the gradients are scaled in place."""
    # torch.optim.AdamW, around the same function, imports torch's compiler when it is made: 1.3 s of every start.
    if not parameters:
        return
    if rates.scale != 1.0:
        torch._foreach_mul_(list(gradients), rates.scale)
    done = torch.full((len(parameters),), rates.updates - 1.0, device=parameters[0].device)
    torch_adamw(
        list(parameters),
        list(gradients),
        list(first),
        list(second),
        [],
        list(done.unbind()),
        fused=True,
        amsgrad=False,
        maximize=False,
        lr=rates.lr,
        beta1=rates.beta1,
        beta2=rates.beta2,
        weight_decay=rates.decay,
        eps=rates.eps,
    )


def adamw(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    rates: Rates,
) -> list[tuple[int, int, int]]:
    """AdamW (arXiv 1711.05101) in place: of parameters and of the moments of their gradients.

    Args:
        parameters: of any shapes.
        gradients: of the same shapes; what they hold afterwards is not said.
        first: means of gradients, likewise.
        second: means of their squares, likewise.
        rates: the numbers.

    Returns:
        The checksums (`checksums`) of what each parameter and its moments have become, in the parameters' order; empty
        where PyTorch did the work and nobody summed.
    """
    everything = [*parameters, *gradients, *first, *second]
    fits = all(t.dtype == torch.float32 and t.is_contiguous() for t in everything)
    if not parameters or not fits or not native.usable(*everything):
        adamw_reference(parameters, gradients, first, second, rates)
        return []
    step = _Step(
        rates.scale,
        1 - rates.lr * rates.decay,
        1 - rates.beta1,
        rates.beta2,
        1 - rates.beta2,
        math.sqrt(1 - rates.beta2**rates.updates),
        rates.eps,
        rates.lr / (1 - rates.beta1**rates.updates),
    )
    sizes = torch.tensor([p.numel() for p in parameters])
    sums = torch.empty(len(parameters), 3, dtype=torch.int64)
    tables = map(_addresses, (parameters, gradients, first, second))
    numbers = torch.frombuffer(step, dtype=torch.float32)
    native.call("adamw", torch.float32, len(parameters), *tables, sizes, numbers, sums)
    return [(p % WORD, m % WORD, v % WORD) for p, m, v in sums.tolist()]


def checksum_reference(tensor: Tensor) -> Tensor:
    """What `checksums` computes of a tensor, in plain PyTorch: an int64 of shape (), with the bits of the word."""
    flat = tensor.detach().contiguous().view(-1)
    cut = flat.numel() * flat.element_size() // 8 * 8 // flat.element_size()
    head = flat[:cut]
    if head.storage_offset() * head.element_size() % 8:
        head = head.clone()  # a view of 64-bit words begins at a multiple of 8 bytes
    total: Tensor = head.view(torch.int64).sum()
    if cut < flat.numel():
        last = torch.zeros(8 // flat.element_size(), dtype=flat.dtype, device=flat.device)
        last[: flat.numel() - cut] = flat[cut:]
        total = total + last.view(torch.int64)[0]
    return total


def checksums(tensors: Sequence[Tensor]) -> list[int]:
    """Of each tensor the sum of its 64-bit words modulo 2⁶⁴, the last one filled up with zeros; any shape, real dtype.

    Every flipped bit changes it, and several flips cancel only if the same bit of two words flips in opposite
    directions.
    """
    return [value % WORD for value in checksum_words(tensors).tolist()]


def checksum_words(tensors: Sequence[Tensor]) -> Tensor:
    """The bits of `checksums`, (tensors,) int64, where the tensors are: a GPU is not waited for."""
    if many.usable(tensors):
        return many.checksums(tensors)
    if not tensors:
        return torch.empty(0, dtype=torch.int64)
    if not native.usable() or any(t.device.type != "cpu" for t in tensors):
        return torch.stack([checksum_reference(tensor) for tensor in tensors])
    flat = [tensor.detach().contiguous() for tensor in tensors]
    sizes = torch.tensor([t.numel() * t.element_size() for t in flat])
    sums = torch.empty(len(flat), dtype=torch.int64)
    native.call("checksums", None, len(flat), _addresses(flat), sizes, sums)
    return sums


def _addresses(tensors: Sequence[Tensor]) -> Tensor:
    """Where tensors lie, as a table of pointers."""
    return torch.tensor([t.data_ptr() for t in tensors], dtype=torch.int64)
