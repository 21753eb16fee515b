"""The batch equation: global_batch = micro_batch × accumulate × data. What is left out is solved for.

Rules, in the order tried:

1. All three given: they must agree.
2. Two given: the third follows, if it comes out whole.
3. `global_batch` alone: `micro_batch` is the largest divisor of each process's samples that is no larger than the
   default, and `accumulate` the rest.
4. Otherwise `micro_batch` defaults to as many samples as hold 4,096 tokens (at least one), `accumulate` to 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

TOKENS_IN_A_MICRO_BATCH = 4096
"""Enough rows to keep matrix units busy, few enough for the activations of one micro-batch to stay small."""


@dataclass(frozen=True)
class Batch:
    """The whole equation.

    Attributes:
        micro_batch: samples in one forward pass of one process.
        accumulate: micro-batches of one process in one step.
        global_batch: samples in one step.
        data: data-parallel replicas.
        how: for each name that was solved for, how it was.
    """

    micro_batch: int
    accumulate: int
    global_batch: int
    data: int
    how: dict[str, str]


class ContradictionError(ValueError):
    """The equation has no solution; `str()` is the whole equation, `fix` what to write instead."""

    def __init__(self, equation: str, fix: str) -> None:
        super().__init__(equation)
        self.fix = fix


def solve(micro_batch: int | None, accumulate: int | None, global_batch: int | None, data: int, sequence: int) -> Batch:
    """Solve the equation for what is None (see the top of this file).

    Args:
        micro_batch: samples in a forward pass, or None.
        accumulate: micro-batches in a step, or None.
        global_batch: samples in a step, or None.
        data: data-parallel replicas.
        sequence: tokens in a sample, for the default micro-batch.

    Raises:
        ContradictionError: no whole numbers fit.
    """
    usual = max(1, TOKENS_IN_A_MICRO_BATCH // sequence)
    how: dict[str, str] = {}
    if global_batch is None:
        if micro_batch is None:
            micro_batch = usual
            how["micro_batch"] = f"default: {TOKENS_IN_A_MICRO_BATCH:,} tokens or 1 sample"
        if accumulate is None:
            accumulate = 1
            how["accumulate"] = "default"
        how["global_batch"] = f"solved: micro_batch {micro_batch} × accumulate {accumulate} × data {data}"
        return Batch(micro_batch, accumulate, micro_batch * accumulate * data, data, how)
    if micro_batch is not None and accumulate is not None:
        if global_batch != micro_batch * accumulate * data:
            raise ContradictionError(*_unequal(global_batch, micro_batch, accumulate, data))
        return Batch(micro_batch, accumulate, global_batch, data, how)
    given, name = (micro_batch, "micro_batch") if micro_batch is not None else (accumulate, "accumulate")
    if global_batch % ((given or 1) * data):
        raise ContradictionError(*_indivisible(global_batch, given, name, data))
    share = global_batch // data
    if micro_batch is None:
        micro_batch = share // accumulate if accumulate else max(divisors(share, usual))
        how["micro_batch"] = f"solved: global_batch {global_batch} ÷ " + (
            f"(accumulate {accumulate} × data {data})" if accumulate else f"data {data}, at most {usual} at once"
        )
    if accumulate is None:
        accumulate = share // micro_batch
        how["accumulate"] = f"solved: global_batch {global_batch} ÷ (micro_batch {micro_batch} × data {data})"
    return Batch(micro_batch, accumulate, global_batch, data, how)


def divisors(number: int, up_to: int) -> Iterator[int]:
    """The divisors of `number` that are no larger than `up_to`."""
    return (candidate for candidate in range(1, min(number, up_to) + 1) if number % candidate == 0)


def _unequal(global_batch: int, micro_batch: int, accumulate: int, data: int) -> tuple[str, str]:
    product = micro_batch * accumulate * data
    equation = (
        f"global_batch {global_batch} ≠ micro_batch {micro_batch} × accumulate {accumulate} × data {data} = {product}"
    )
    offers = [f"global_batch = {product}"]
    if global_batch % (micro_batch * data) == 0:
        offers.append(f"accumulate = {global_batch // (micro_batch * data)}")
    if global_batch % (accumulate * data) == 0:
        offers.append(f"micro_batch = {global_batch // (accumulate * data)}")
    return equation, f"write {' or '.join(offers)}, or leave one of them out to have it solved for"


def _indivisible(global_batch: int, given: int | None, name: str, data: int) -> tuple[str, str]:
    unit = (given or 1) * data
    factors = f"{name} {given} × data {data}" if given else f"data {data}"
    other = {"micro_batch": "accumulate", "accumulate": "micro_batch"}[name] if given else "micro_batch × accumulate"
    equation = f"global_batch {global_batch} ≠ {factors} × {other} for every whole {other}"
    offers = [f"global_batch = {' or '.join(map(str, neighbours(global_batch, unit)))}"]
    share = global_batch // data
    if given and global_batch % data == 0:
        nearest = min(divisors(share, 100_000), key=lambda d: (abs(d - given), d))
        offers.append(f"{name} = {nearest}")
    return equation, f"write {' or '.join(offers)}"


def neighbours(number: int, unit: int) -> list[int]:
    """The multiples of `unit` on both sides of `number` (only the upper one where the lower is 0)."""
    below = number // unit * unit
    return [multiple for multiple in (below, below + unit) if multiple > 0]
