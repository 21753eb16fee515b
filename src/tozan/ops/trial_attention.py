"""Tries the attention of `attention_tiles.cpp`: is it right, and how fast is it beside batched products?

    python -m tozan.ops.trial_attention LIBRARY THREADS

As `trial` does for products; the rival is what attention would be without it, `attention.blocks`.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tozan.ops import attention, fused
from tozan.ops.trial import ROUNDS, timed


class Heads(NamedTuple):
    """What attention is tried on."""

    samples: int
    heads: int
    kv_heads: int
    tokens: int
    size: int


SHAPES = (Heads(1, 3, 1, 33, 40), Heads(2, 2, 2, 130, 64), Heads(1, 2, 1, 520, 128))
"""What is compared: ragged along queries, keys and heads; grouped heads; several blocks of keys."""
LAYER = Heads(1, 12, 12, 1024, 64)
"""What is timed: a sample in a layer of GPT-2."""
DIRECTIONS = ("forward", "backward")
BOUND = 2**-7
"""Of the error's norm, over the norm of the result."""


def operands(shape: Heads) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random queries, keys, values and gradient of the output, in memory as the model's products leave them."""
    generator = torch.Generator().manual_seed(0)
    count = shape.heads + 2 * shape.kv_heads
    made = torch.randn(shape.samples, shape.tokens, count + shape.heads, shape.size, generator=generator).bfloat16()
    sizes = [shape.heads, shape.kv_heads, shape.kv_heads, shape.heads]
    q, k, v, dy = torch.split(made.transpose(1, 2), sizes, dim=1)
    return q, k, v, dy


class Kernel:
    """Both directions of a library on operands, and what they have made: y, dq, dk and dv."""

    def __init__(self, library: ctypes.CDLL, given: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
        self.library, self.given = library, given
        q, k = given[:2]
        self.logs = q.new_empty(q.shape[:3], dtype=torch.float32)
        self.y, self.gradients = attention.empty_output(q), attention.empty_gradients(q, k)

    def forward(self) -> None:
        """Makes y."""
        fused.forward(*self.given[:3], self.y, self.logs, kernel=self.library)

    def backward(self) -> None:
        """Makes the gradients."""
        q, k, v, dy = self.given
        parts = attention.split_gradients(self.gradients, k)
        fused.backward(dy, q, k, v, self.y, self.logs, parts, kernel=self.library)

    def made(self, threads: int) -> list[Tensor]:
        """All four, on so many threads."""
        torch.set_num_threads(threads)
        self.forward()
        self.backward()
        return [t.clone() for t in (self.y, *attention.split_gradients(self.gradients, self.given[1]))]


def exact(q: Tensor, k: Tensor, v: Tensor, dy: Tensor) -> list[Tensor]:
    """The same in fp64, by PyTorch."""
    tensors = [t.double().requires_grad_() for t in (q, k, v)]
    y = attention.causal_attention_reference(*tensors)
    return [y.detach(), *torch.autograd.grad(y, tensors, dy.double())]


def wrong(library: ctypes.CDLL, threads: int, shapes: Sequence[Heads]) -> str:
    """What is wrong with the library's attention; empty if nothing is."""
    for shape in shapes:
        given = operands(shape)
        kernel = Kernel(library, given)
        found, alone, expected = kernel.made(threads), kernel.made(1), exact(*given)
        torch.set_num_threads(threads)
        where = f"of {shape.heads} heads of {shape.size}, {shape.tokens} tokens"
        for name, one, right in zip(("output", "dq", "dk", "dv"), found, expected, strict=True):
            error = float((one - right).norm() / right.norm())
            if not error <= BOUND:  # NaN is wrong, too
                return f"wrong by {error:.1e} in {name} {where}"
        if not all(map(torch.equal, found, alone)):
            return f"bits that are not always the same {where}"
    return ""


def seconds(library: ctypes.CDLL, shape: Heads = LAYER, rounds: int = ROUNDS) -> tuple[list[float], list[float]]:
    """Of both directions, the rival's and the library's: the least of some rounds, in turn."""
    q, k, v, dy = given = operands(shape)
    kernel = Kernel(library, given)
    parts = attention.split_gradients(attention.empty_gradients(q, k), k)
    works: list[Callable[[], object]] = [
        lambda: attention.blocks(q, k, v),
        lambda: attention.blocks_backward(dy, q, k, v, *parts),
        kernel.forward,
        kernel.backward,
    ]
    best = [float("inf")] * len(works)
    for _ in range(rounds):
        best = [min(least, timed(work)) for least, work in zip(best, works, strict=True)]
    return best[:2], best[2:]


def run(library: ctypes.CDLL, threads: int) -> dict[str, Any]:
    """Compares, and times if all is right; see `tiles.judge`."""
    torch.set_num_threads(threads)
    if not library.tiles_permitted():
        return {"wrong": "Linux lets processes use no AMX tiles"}
    if found := wrong(library, threads, SHAPES):
        return {"wrong": found}
    theirs, ours = seconds(library)
    rival = "the rate of batched products"
    return {"wrong": "", "rival": rival, "directions": DIRECTIONS, "torch": theirs, "tiles": [[None, ours]]}


if __name__ == "__main__":
    print(json.dumps(run(ctypes.CDLL(sys.argv[1]), int(sys.argv[2]))))
