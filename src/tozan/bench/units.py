"""What the trainer's own operations take on this machine: the units that `planner.local` adds up to a step.

Each is measured as training runs it: the real modules, under autocast, forward and backward apart, gradients added to
fp32 weights. The times of a few sizes give, by least squares with coefficients of at least zero, the seconds per FLOP,
per byte-bound element and per call.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import combinations
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tozan.bench.measure import times
from tozan.comm import Axis
from tozan.models.arithmetic import Shape
from tozan.models.layers import Attention, LayerNorm, Linear, RMSNorm, Rotary
from tozan.ops import checksums, gelu, linear_cross_entropy, swiglu
from tozan.optim.adamw import AdamW
from tozan.optim.gradients import norm_of_sums, squares_of, sums_of_squares
from tozan.parallel import context
from tozan.parallel.summa import Grid
from tozan.parallel.tensor_1d import VocabularyProducts
from tozan.parallel.tensor_2d import SummaLinear
from tozan.parallel.vocabulary import sharded_cross_entropy

LINEARS = (
    (4096, 768, 2304),
    (4096, 3072, 768),
    (1024, 768, 3072),
    (1024, 768, 768),
    (2048, 256, 768),
    (512, 384, 384),
    (256, 1024, 256),
    (64, 128, 512),
)
"""Linear layers as (tokens, inputs, outputs): of GPT-2 124M, of its shards, and of small models."""
ATTENTIONS = ((1, 12, 1024, 64), (2, 12, 256, 64), (4, 4, 128, 32), (2, 3, 512, 64))
"""Attention as (samples, heads, tokens, head size)."""
STREAMS = ((4096, 768), (1024, 768), (512, 256))
"""Residual streams as (tokens, width)."""
HEADS = ((1024, 768, 8192), (512, 256, 4096), (256, 768, 50304), (1024, 256, 1024))
"""Output heads as (tokens, width, vocabulary)."""

COLD = 1 << 26
"""Bytes of the layers that a linear layer is timed among, so that its weights come from memory as in a step."""

Times = tuple[float, float]
"""Seconds forward and backward."""


class Optim:
    """The `[optim]` table that AdamW reads; its values cost nothing."""

    lr, beta1, beta2, eps, weight_decay = 1e-4, 0.9, 0.95, 1e-8, 0.1


def measure(precision: str, seconds: float, shrink: int = 1) -> dict[str, list[float]]:
    """All units, with this process's threads.

    Args:
        precision: `bf16`, or `fp32` for no autocast.
        seconds: spent on each size.
        shrink: divides tokens, widths and vocabularies, for a rough and quick answer.

    Returns:
        Coefficients by name, as `planner.machine.Trainer` explains them.
    """
    dtype = torch.bfloat16 if precision == "bf16" else None

    def small(sizes: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        return [tuple(max(1, n // shrink) for n in size) for size in sizes]

    linears, streams, heads = small(LINEARS), small(STREAMS), small(HEADS)
    attentions = [(b, h, max(8, t // shrink), s) for b, h, t, s in ATTENTIONS]
    found: dict[str, list[float]] = {}

    def note(name: str, terms: list[list[float]], taken: list[Times]) -> None:
        for direction, values in zip(("forward", "backward"), zip(*taken, strict=True), strict=True):
            found[f"{name}_{direction}"] = fit(terms, list(values))

    note(
        "linear",
        [[2.0 * n * i * o, i * o, n * (i + o), 1] for n, i, o in linears],
        [_linear(dtype, seconds, COLD // shrink**2, *size) for size in linears],
    )
    shards = linears[2:]
    note(
        "grid",
        [[2.0 * n * i * o, i * o, n * (i + o), 1] for n, i, o in shards],
        [_grid(dtype, seconds, *size) for size in shards],
    )
    note("norm", [[n * d, 1] for n, d in streams], [_norm(dtype, seconds, LayerNorm, *size) for size in streams])
    note("rms", [[n * d, 1] for n, d in streams], [_norm(dtype, seconds, RMSNorm, *size) for size in streams])
    inner = [(n, 4 * d) for n, d in streams]
    note("gelu", [[n * f, 1] for n, f in inner], [_activation(dtype, seconds, False, *size) for size in inner])
    note("swiglu", [[n * f, 1] for n, f in inner], [_activation(dtype, seconds, True, *size) for size in inner])
    scores = [[2.0 * b * h * t * t * s, b * h * t * t / 2, b * h * t * s, b] for b, h, t, s in attentions]
    note("attention", scores, [_attention(dtype, seconds, *size) for size in attentions])
    turned = [[1.0 * b * h * t * s, 1] for b, h, t, s in attentions]
    note("rotary", turned, [_rotary(dtype, seconds, *size) for size in attentions])
    note("ring", scores, [_ring(dtype, seconds, *size) for size in attentions])
    for name, sharded in (("head", False), ("sharded_head", True)):
        both = [sum(_head(dtype, seconds, sharded, *size)) for size in heads]
        found[name] = fit([[6.0 * n * d * v, n * v, d * v, 1] for n, d, v in heads], both)
    both = [sum(_embedding(seconds, *size)) for size in heads]
    found["embedding"] = fit([[n * d, d * v, 1] for n, d, v in heads], both)
    found["optimizer"] = [_optimizer(seconds, max(1024, 2**23 // shrink))]
    return found


def fit(terms: list[list[float]], times: list[float]) -> list[float]:
    """Coefficients ≥ 0 of terms whose sums come nearest to the times, in relative error.

    Args:
        terms: one row per time.
        times: seconds.
    """
    rows, ones = np.array(terms, dtype=float) / np.array(times)[:, None], np.ones(len(times))
    scale = rows.max(axis=0)
    scaled = rows / scale
    best: tuple[float, list[float]] = (float("inf"), [0.0] * rows.shape[1])
    for size in range(1, rows.shape[1] + 1):
        for chosen in combinations(range(rows.shape[1]), size):
            part, *_ = np.linalg.lstsq(scaled[:, chosen], ones, rcond=None)
            miss = float(np.square(scaled[:, chosen] @ part - 1).sum())
            if (part >= 0).all() and miss < best[0] - 1e-12:
                found = [0.0] * rows.shape[1]
                for index, value in zip(chosen, part, strict=True):
                    found[index] = float(value / scale[index])
                best = miss, found
    return best[1]


def _passes(seconds: float, dtype: torch.dtype | None, forward: Callable[[], Tensor], *inputs: Tensor) -> Times:
    """`_passes_of` one operation, which finds what it needs where it left it."""
    return _passes_of(seconds, dtype, [forward], *inputs)


def _passes_of(
    seconds: float, dtype: torch.dtype | None, forwards: Sequence[Callable[[], Tensor]], *inputs: Tensor
) -> Times:
    """Median seconds of a forward and a backward pass of one of several operations alike, after a round to warm up.

    All forward passes come before all backward passes, as in a step. Weights keep their gradients, to which the next is
    added; `inputs` lose theirs, as activations do.
    """
    ahead: list[float] = []
    back: list[float] = []
    gradient: Tensor | None = None
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(ahead) < 4:
        begin = time.perf_counter()
        with torch.autocast("cpu", dtype=dtype) if dtype else nullcontext():
            results = [forward() for forward in forwards]
        between = time.perf_counter()
        if gradient is None:
            gradient = torch.randn(results[0].shape, dtype=torch.float32).to(results[0].dtype)
        started = time.perf_counter()
        while results:
            results.pop().backward(gradient)  # type: ignore[no-untyped-call]
        ahead.append((between - begin) / len(forwards))
        back.append((time.perf_counter() - started) / len(forwards))
        for x in inputs:
            x.grad = None
    return median(ahead[1:]), median(back[1:])


def _linear(dtype: torch.dtype | None, seconds: float, cold: int, tokens: int, inputs: int, outputs: int) -> Times:
    """A linear layer: casts of weight and input, product, bias; two products, their casts, adding to `.grad`."""
    copies = max(2, min(64, cold // (8 * inputs * outputs + 2 * tokens * (inputs + outputs))))
    layers = [Linear(inputs, outputs) for _ in range(copies)]
    sources = [torch.randn(tokens, inputs).to(dtype or torch.float32).requires_grad_() for _ in layers]
    calls = [partial(layer, x) for layer, x in zip(layers, sources, strict=True)]
    return _passes_of(seconds, dtype, calls, *sources)


def _grid(dtype: torch.dtype | None, seconds: float, tokens: int, inputs: int, outputs: int) -> Times:
    """A linear layer on a grid of ranks, without what they send: SUMMA's products of blocks, and their sums."""
    alone = Axis.single()
    layer = SummaLinear({"weight": nn.Parameter(torch.randn(outputs, inputs))}, Grid(alone, alone))
    source = torch.randn(tokens, inputs).to(dtype or torch.float32).requires_grad_()
    return _passes(seconds, dtype, lambda: layer(source), source)


def _norm(dtype: torch.dtype | None, seconds: float, kind: type[LayerNorm | RMSNorm], tokens: int, width: int) -> Times:
    """A residual sum and the norm after it."""
    norm = kind(width, 1e-5)
    x = torch.randn(tokens, width, requires_grad=True)
    branch = torch.randn(tokens, width).to(dtype or torch.float32).requires_grad_()

    def forward() -> Tensor:
        return norm(x + branch)  # type: ignore[no-any-return]

    return _passes(seconds, dtype, forward, x, branch)


def _activation(dtype: torch.dtype | None, seconds: float, gated: bool, tokens: int, width: int) -> Times:
    """GELU, or SiLU times its gate."""
    h = torch.randn(tokens, width).to(dtype or torch.float32).requires_grad_()
    gate = h.detach().clone().requires_grad_()
    if gated:
        return _passes(seconds, dtype, lambda: swiglu(h, gate), h, gate)
    return _passes(seconds, dtype, lambda: gelu(h), h)


def _attention(dtype: torch.dtype | None, seconds: float, batch: int, heads: int, tokens: int, size: int) -> Times:
    """Attention between its two products: heads taken apart, attended, and laid side by side."""
    shape = Shape("gpt2", 1, heads * size, heads, heads, 4, 2, tokens)
    attention: Any = Attention(shape, bias=False)
    attention.proj = nn.Identity()
    qkv = torch.randn(batch, tokens, 3 * heads * size).to(dtype or torch.float32).requires_grad_()
    return _passes(seconds, dtype, lambda: attention(qkv), qkv)


def _rotary(dtype: torch.dtype | None, seconds: float, batch: int, heads: int, tokens: int, size: int) -> Times:
    """Rotation of queries and keys, which lie as their linear layer left them."""
    rotary = Rotary(size, tokens, 1e4)
    x = torch.randn(batch, tokens, heads, size).to(dtype or torch.float32).requires_grad_()
    return _passes(seconds, dtype, lambda: rotary(x, heads), x)


def _ring(dtype: torch.dtype | None, seconds: float, batch: int, heads: int, tokens: int, size: int) -> Times:
    """A step of context parallelism's ring: half a block of attention, put together with those before."""
    q, k, v, dy = (torch.randn(batch, heads, tokens, size).to(dtype or torch.float32) for _ in range(4))
    out, logs = torch.zeros(q.shape), torch.zeros(q.shape[:3])
    dq, seen = torch.zeros(q.shape), slice(0, tokens // 2)
    keys, values, saved = k[:, :, seen], v[:, :, seen], torch.zeros_like(q)

    def forward() -> None:
        part = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, keys, values, 0.0, False)
        context.merge(out, logs, *part)

    def backward() -> None:
        dq_part, *parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dy, q, keys, values, saved, logs, 0.0, False
        )
        dq.add_(dq_part)
        torch.zeros(2, *q.shape)[:, :, :, seen] = torch.stack(parts).float()

    ahead, back = times(forward, seconds), times(backward, seconds)
    return median(ahead), median(back)


def _head(dtype: torch.dtype | None, seconds: float, sharded: bool, tokens: int, width: int, vocabulary: int) -> Times:
    """The output head with its loss: all three products in the forward pass; `sharded`: of a part of the vocabulary."""
    weight = nn.Parameter(0.02 * torch.randn(vocabulary, width))
    x = torch.randn(tokens, width, requires_grad=True)
    targets = torch.randint(vocabulary, (tokens,))
    part = VocabularyProducts(Axis.single())
    if sharded:
        return _passes(seconds, dtype, lambda: sharded_cross_entropy(x, weight, targets, part, vocabulary), x)
    return _passes(seconds, dtype, lambda: linear_cross_entropy(x, weight, targets), x)


def _embedding(seconds: float, tokens: int, width: int, vocabulary: int) -> Times:
    """Looking tokens up; the gradient is as large as the table."""
    table = nn.Embedding(vocabulary, width)
    ids = torch.randint(vocabulary, (1, tokens))
    return _passes(seconds, None, lambda: table(ids))


def _optimizer(seconds: float, size: int) -> float:
    """Seconds per parameter of norm, clipping, AdamW, and the checksums of what rests before and after it."""
    parameters = {f"p{i}": nn.Parameter(torch.randn(size // 4096, 1024)) for i in range(4)}
    adamw = AdamW(parameters, Optim())
    resting = [*(p.detach() for p in parameters.values()), *adamw.tensors().values()]
    times: list[float] = []
    end = time.perf_counter() + 2 * seconds
    while time.perf_counter() < end or len(times) < 4:
        for parameter in parameters.values():
            parameter.grad = torch.randn_like(parameter)
        begin = time.perf_counter()
        norm_of_sums(sums_of_squares(squares_of(parameters)))
        checksums(resting)
        if not adamw.step(1e-4, 0.5):
            checksums(resting)
        times.append(time.perf_counter() - begin)
    return median(times[1:]) / sum(p.numel() for p in parameters.values())
