"""Kernels for GPUs, in Triton: sums over many tensors (see `many`), and cross-entropy with its gradient.

A sum takes any number of tensors, whose addresses are in a table: program (n, p) works on part p of tensor n. Every
program works by itself and always in the same order, so that bits repeat.
"""

import triton
import triton.language as tl


@triton.jit
def checksum(addresses, words, sums, BLOCK: tl.constexpr, PARTS: tl.constexpr):  # noqa: N803
    """Sums of 64-bit words modulo 2⁶⁴, (tensors, PARTS): of tensors that are so many 32-bit words long."""
    tensor, part = tl.program_id(0), tl.program_id(1)
    first = tl.load(addresses + tensor).to(tl.pointer_type(tl.int32))
    length = tl.load(words + tensor)
    total = tl.zeros([BLOCK], tl.int64)
    for start in range(part * BLOCK, length, PARTS * BLOCK):
        at = start + tl.arange(0, BLOCK)
        word = tl.load(first + at, mask=at < length, other=0).to(tl.int64) & 0xFFFFFFFF
        total += word << ((at & 1) * 32)
    tl.store(sums + tensor * PARTS + part, tl.sum(total))


@triton.jit
def squares(addresses, sizes, offsets, found, SEGMENT: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr):  # noqa: N803
    """The sum of squares of every SEGMENT neighbours of fp32 tensors, in fp64, from `offsets` of `found` on."""
    tensor, part = tl.program_id(0), tl.program_id(1)
    first = tl.load(addresses + tensor).to(tl.pointer_type(tl.float32))
    size, offset = tl.load(sizes + tensor), tl.load(offsets + tensor)
    segments = (size + SEGMENT - 1) // SEGMENT
    for start in range(part * ROWS, segments, PARTS * ROWS):
        rows = start + tl.arange(0, ROWS)
        at = rows[:, None] * SEGMENT + tl.arange(0, SEGMENT)[None, :]
        x = tl.load(first + at, mask=at < size, other=0.0)
        tl.store(found + offset + rows, tl.sum(x * x, axis=1).to(tl.float64), mask=rows < segments)


@triton.jit
def sums(values, offsets, counts, found, BLOCK: tl.constexpr):  # noqa: N803
    """The sum of `counts` neighbours in fp64 from each of `offsets` on."""
    piece = tl.program_id(0)
    offset, count = tl.load(offsets + piece), tl.load(counts + piece)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(values + offset + at, mask=at < count, other=0.0)
    tl.store(found + piece, tl.sum(total))


@triton.jit
def cross_entropy(
    logits,
    targets,
    losses,
    gradient,
    vocabulary,
    IGNORE: tl.constexpr,  # noqa: N803
    WITH_GRADIENT: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    """One program for each token: its loss, and softmax - one-hot, which may take the place of the logits.

    The logits are read twice, the second time from the cache. The loss of a target outside of the vocabulary is NaN.
    """
    token = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + token)
    logits += token * vocabulary
    gradient += token * vocabulary
    largest = float("-inf")
    total = 0.0
    for start in range(0, vocabulary, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(logits + at, mask=at < vocabulary, other=float("-inf")).to(tl.float32)
        before, largest = largest, tl.maximum(largest, tl.max(x))
        total = total * tl.exp(before - largest) + tl.sum(tl.exp(x - largest))
    log_sum = largest + tl.log(total)
    known = (target >= 0) & (target < vocabulary)
    own = tl.load(logits + target, mask=known, other=float("nan")).to(tl.float32)
    tl.store(losses + token, tl.where(target == IGNORE, 0.0, log_sum - own))
    if WITH_GRADIENT:
        for start in range(0, vocabulary, BLOCK):
            at = start + tl.arange(0, BLOCK)
            x = tl.load(logits + at, mask=at < vocabulary, other=float("-inf")).to(tl.float32)
            p = tl.exp(x - log_sum) - tl.where(at == target, 1.0, 0.0)
            tl.store(gradient + at, tl.where(target == IGNORE, 0.0, p), mask=at < vocabulary)
