"""Tries the products of `gemm_tiles.cpp`: are they right, and how fast are they beside PyTorch's?

    python -m tozan.ops.trial LIBRARY THREADS

`tiles` runs it as a process of its own, since an instruction that the processor or the kernel refuses ends a process.
It prints one line of JSON (see `tiles.judge`).
"""

from __future__ import annotations

import ctypes
import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tozan.ops import native

SIZES = ((37, 53, 41), (150, 70, 900), (1056, 1024, 64))
"""Rows, columns and summed dim of what is compared: ragged at every edge, several parts along k, past the caches."""
LAYER = (2048, 768, 3072)
"""Tokens, inputs and outputs of the linear layer that is timed."""
SETTINGS = tuple(itertools.product((8, 12, 16, 1 << 30), (True, False)))
"""What the kernel can be set to: steps along k at once, and whether large results go past the caches."""
EXTREMES = (SETTINGS[0], SETTINGS[-1])
"""Those whose results are compared."""
DIRECTIONS = ("forward", "input gradient", "weight gradient")
ROUNDS = 7
"""Times that each product is timed; the fastest counts, since others may use the machine meanwhile."""
_TYPES = {"f": torch.float32, "b": torch.bfloat16}
_BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 2**-8}
"""Of the error's norm, over the norm of the result."""


def product(
    library: ctypes.CDLL,
    a: Tensor,
    b: Tensor,
    result: torch.dtype,
    bias: Tensor | None = None,
    into: Tensor | None = None,
) -> Tensor:
    """A · B by the library, whatever it is good for."""
    letters = {dtype: letter for letter, dtype in _TYPES.items()}
    y = torch.empty(a.shape[0], b.shape[1], dtype=result) if into is None else into
    variant = letters[a.dtype] + letters[b.dtype] + letters[y.dtype]
    native.product(variant, a, b, y, bias, add=into is not None, library=library)
    return y


def wrong(library: ctypes.CDLL, threads: int, sizes: Sequence[tuple[int, int, int]] = SIZES) -> str:
    """What is wrong with the library's products, in every layout and type, however set; empty if nothing is."""
    variants = [variant for variant in native.PRODUCTS if variant[0] == "b"]
    for (m, n, k), left, right, variant in itertools.product(sizes, (False, True), (False, True), variants):
        result = _TYPES[variant[2]]
        a, b = _matrix(m, k, left).bfloat16(), _matrix(k, n, right).to(_TYPES[variant[1]])
        bias, there = torch.linspace(-1, 1, n), _matrix(m, n, False).to(result)
        exact = a.double() @ b.bfloat16().double() + bias
        made = []
        for setting in EXTREMES:
            set_to(library, *setting)
            made.append(product(library, a, b, result, bias))
        torch.set_num_threads(1)
        made.append(torch.cat([made[0][:1], product(library, a[1:], b, result, bias)]))
        torch.set_num_threads(threads)
        error = float((made[0] - exact).norm() / exact.norm())
        if result == torch.float32:
            added = product(library, a, b, result, bias, there.clone())
            error = max(error, float((added - there - exact).norm() / (exact + there).norm()))
        if not error <= _BOUNDS[result]:  # NaN is wrong, too
            return f"wrong by {error:.1e} in {variant}, {m} × {k} times {k} × {n}"
        if not all(torch.equal(made[0], other) for other in made):
            return f"bits that are not always the same in {variant}, {m} × {k} times {k} × {n}"
    return ""


def set_to(library: ctypes.CDLL, steps: int, stream: bool) -> None:
    """Set the library to one of `SETTINGS`."""
    library.gemm_tiles_tune(ctypes.c_long(steps), ctypes.c_int(stream))


def _matrix(rows: int, columns: int, transposed: bool) -> Tensor:
    generator = torch.Generator().manual_seed(rows + columns)
    made = torch.randn((columns, rows) if transposed else (rows, columns), generator=generator)
    return made.T if transposed else made


def seconds(
    library: ctypes.CDLL, layer: tuple[int, int, int] = LAYER, rounds: int = ROUNDS
) -> tuple[list[float], list[tuple[tuple[int, bool], list[float]]]]:
    """Of a linear layer's three products in bf16 with fp32 weights: PyTorch's, and the library's for each setting.

    PyTorch's are those of autocast: it casts the weight in the forward pass, keeps that for the input's gradient, and
    makes the weight's gradient in bf16 before it casts it. Operands are random: matrix units run faster on zeros.
    """
    tokens, inputs, outputs = layer
    x, dy = _matrix(tokens, inputs, False).bfloat16(), _matrix(tokens, outputs, False).bfloat16()
    w, bias = _matrix(outputs, inputs, False), torch.linspace(-1, 1, outputs)
    cast = w.bfloat16()
    theirs: list[Callable[[], object]] = [
        lambda: torch.addmm(bias.bfloat16(), x, w.bfloat16().T),
        lambda: torch.mm(dy, cast),
        lambda: torch.mm(dy.T, x).float(),
    ]
    ours: list[Callable[[], object]] = [
        lambda: product(library, x, w.T, torch.bfloat16, bias),
        lambda: product(library, dy, w, torch.bfloat16),
        lambda: product(library, dy.T, x, torch.float32),
    ]
    best_theirs = [float("inf")] * len(theirs)
    best = {setting: [float("inf")] * len(ours) for setting in SETTINGS}
    for _ in range(rounds):
        for i, (their, our) in enumerate(zip(theirs, ours, strict=True)):
            best_theirs[i] = min(best_theirs[i], timed(their))
            for setting in SETTINGS:
                set_to(library, *setting)
                best[setting][i] = min(best[setting][i], timed(our))
    return best_theirs, list(best.items())


def timed(function: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def run(library: ctypes.CDLL, threads: int) -> dict[str, Any]:
    """Compares, and times if all is right."""
    torch.set_num_threads(threads)
    if not library.tiles_permitted():
        return {"wrong": "Linux lets processes use no AMX tiles"}
    if found := wrong(library, threads):
        return {"wrong": found}
    theirs, ours = seconds(library)
    return {"wrong": "", "rival": "PyTorch's rate", "directions": DIRECTIONS, "torch": theirs, "tiles": ours}


if __name__ == "__main__":
    print(json.dumps(run(ctypes.CDLL(sys.argv[1]), int(sys.argv[2]))))
