"""Causal attention by a kernel (`attention.h`): which tensors it takes, and how they are handed over.

There are two: `attention.cpp` on AVX-512, and `attention_tiles.cpp` on AMX where a trial found it right and faster than
batched products (see `tiles`).
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from tozan.ops import native, tiles

SOURCE = Path(__file__).with_name("attention.cpp")
LARGEST_HEAD = 512
"""Elements of a head, at most: a block's panels would leave the second-level cache."""

LANES = 32
"""Queries that the kernel takes at once."""

_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


class _View(ctypes.Structure):
    """Where the heads of a tensor (samples, heads, tokens, size) lie; strides in elements."""

    _fields_ = (("p", ctypes.c_void_p), *((name, ctypes.c_long) for name in ("sample", "head", "token")))


class _Sizes(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_long) for name in ("samples", "heads", "kv_heads", "tokens", "size"))


def usable(q: Tensor) -> bool:
    """Whether a kernel takes these queries, with keys and values of their type, and was measured to pay here."""
    if not native.usable(q) or not 0 < q.shape[-1] <= LARGEST_HEAD or q.numel() == 0:
        return False
    return library(q.dtype) is not None


def status(dtype: torch.dtype | None) -> str:
    """Who does causal attention in `dtype` on this processor, and why; None: it is done elsewhere."""
    return tiles.status("attention", dtype, lambda: library(torch.float32) is not None, "PyTorch")


def mean_keys(tokens: int) -> int:
    """Keys that a query is multiplied with on average: the causal half, rounded up to the kernel's tiles."""
    return min(tokens, (tokens + LANES) // 2)


def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The kernel for this type, if there is one that pays.

    That of AVX-512 was measured on AMD's Zen 4. Intel's processors with its instructions have AMX beside them, which
    PyTorch's libraries use for the products of blocks.
    """
    found = tiles.library("attention") if dtype == torch.bfloat16 else None
    if found is None and (vectors := on_vectors()) is not None and vectors.attention_pays():
        return vectors
    return found


@functools.cache
def on_vectors() -> ctypes.CDLL | None:
    """The kernel on AVX-512, if it can be compiled and this processor has the instructions."""
    found = native.open_library(SOURCE)[0]
    return found if hasattr(found, "attention_pays") else None


def forward(q: Tensor, k: Tensor, v: Tensor, y: Tensor, logs: Tensor, *, kernel: ctypes.CDLL | None = None) -> None:
    """Writes the output, and what backward wants to know of each query.

    Args:
        q: queries (B, H, T, S) in fp32 or bf16, of any strides.
        k: keys (B, K, T, S), where K divides H, likewise.
        v: values (B, K, T, S), likewise.
        y: output (B, H, T, S); the elements of a head lie side by side.
        logs: (B, H, T), contiguous fp32: logarithms to base 2 of each query's sum of exponentials.
        kernel: the library that does it; default: that of `library`.
    """
    taken = [_rows(t) for t in (q, k, v)]  # kept until the kernel is done
    _call(kernel, "attention", q, k, *map(_view, taken), _view(y), ctypes.c_void_p(logs.data_ptr()))


def backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    logs: Tensor,
    gradients: tuple[Tensor, Tensor, Tensor],
    *,
    kernel: ctypes.CDLL | None = None,
) -> None:
    """Writes the gradients of q, k and v, whose heads' elements lie side by side, from that of the output."""
    taken = [_rows(t) for t in (q, k, v, y, dy)]
    _call(
        kernel,
        "attention_backward",
        q,
        k,
        *map(_view, taken),
        ctypes.c_void_p(logs.data_ptr()),
        *map(_view, gradients),
    )


def _call(kernel: ctypes.CDLL | None, name: str, q: Tensor, k: Tensor, *arguments: object) -> None:
    sizes = _Sizes(q.shape[0], q.shape[1], k.shape[1], q.shape[2], q.shape[3])
    found = kernel or library(q.dtype)
    assert found is not None
    with native.noted(f"tozan::{name}"):
        found[f"{name}_{_TYPES[q.dtype]}"](ctypes.byref(sizes), *arguments, ctypes.c_int(torch.get_num_threads()))


def _rows(x: Tensor) -> Tensor:
    """The same tensor with the elements of a head side by side."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _view(x: Tensor) -> object:
    return ctypes.byref(_View(x.data_ptr(), *x.stride()[:3]))
