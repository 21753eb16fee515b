"""What PyTorch's communication backends do on this machine, by operation and type: really tried, results checked.

Three ranks, because what is lost in a 16-bit sum shows only from the second addition on: 256 + 1 + 1 is 258 in bf16
if it is added in fp32 and rounded once, and 256 if it is rounded after every addition.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup
Attempt = Callable[[torch.dtype, int, int, Group], str]

RANKS = 3
DTYPES = {
    **{"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16},
    **{"int64": torch.int64, "int32": torch.int32, "uint8": torch.uint8, "fp8": torch.float8_e4m3fn},
}
SECONDS = 10
"""That one try may take; a rank that fails alone leaves the others waiting for so long."""

GOOD = "ok"
MEANINGS = {
    "ok": "right result",
    "NaN lost": "a NaN on one rank does not reach the maximum",
    "rounded": "rounded after every addition, so the sum depends on the number and order of ranks",
    "wrong": "another result than it should be",
    "no": "refused",
}


def trials(rank: int, ranks: int) -> dict[str, dict[str, str]]:
    """Try everything on gloo; a collective of the default group, which is used for agreement alone.

    Returns:
        Verdict (a key of `MEANINGS`) by operation and type: the worst of all ranks.
    """
    found: dict[str, dict[str, str]] = {}
    verdicts = list(MEANINGS)
    tested = _fresh_group()
    for operation, attempt in OPERATIONS.items():
        found[operation] = {}
        for name, dtype in DTYPES.items():
            mine = _verdict(attempt, dtype, rank, ranks, tested)
            worst = torch.tensor([verdicts.index(mine)])
            dist.all_reduce(worst, dist.ReduceOp.MAX)
            found[operation][name] = verdicts[int(worst)]
            if verdicts[int(worst)] == "no":  # after an error a group cannot be relied on
                tested = _fresh_group()
    return found


def _fresh_group() -> Group:
    made: Group = dist.new_group(timeout=timedelta(seconds=SECONDS))
    return made


def _verdict(attempt: Attempt, dtype: torch.dtype, rank: int, ranks: int, group: Group) -> str:
    try:
        return attempt(dtype, rank, ranks, group)
    except (RuntimeError, TypeError, ValueError, NotImplementedError):
        return "no"


def _numbers(dtype: torch.dtype, rank: int, count: int = 12) -> Tensor:
    """Small whole numbers, exact in every type, other ones on every rank."""
    return ((torch.arange(count) + rank) % 4).to(dtype)


def _same(a: Tensor, b: Tensor) -> str:
    if a.dtype.itemsize == 1:  # fp8 has no comparison
        a, b = a.view(torch.uint8), b.view(torch.uint8)
    return GOOD if torch.equal(a, b) else "wrong"


def _sum(dtype: torch.dtype, rank: int, ranks: int, group: Group) -> str:
    x = _numbers(dtype, rank)
    wanted = sum((_numbers(torch.float64, other) for other in range(ranks)), torch.zeros(len(x), dtype=torch.float64))
    dist.all_reduce(x, group=group)
    if _same(x, wanted.to(dtype)) != GOOD:
        return "wrong"
    if dtype not in (torch.bfloat16, torch.float16):
        return GOOD
    large = {torch.bfloat16: 256.0, torch.float16: 2048.0}[dtype]
    # The large number on each rank in turn, all through the buffer: some order of addition loses the ones after it.
    x = torch.ones(ranks * 8, dtype=dtype)
    x[rank::ranks] = large
    dist.all_reduce(x, group=group)
    return GOOD if bool((x == large + ranks - 1).all()) else "rounded"


def _max(dtype: torch.dtype, rank: int, ranks: int, group: Group) -> str:
    x = _numbers(dtype, rank)
    wanted = torch.stack([_numbers(torch.float64, other) for other in range(ranks)]).amax(0)
    dist.all_reduce(x, dist.ReduceOp.MAX, group)
    if _same(x, wanted.to(dtype)) != GOOD:
        return "wrong"
    if not dtype.is_floating_point:
        return GOOD
    # A NaN on each rank in turn, since the order of comparison decides whether it survives.
    x = torch.zeros(ranks * 8, dtype=dtype)
    x[rank::ranks] = math.nan
    dist.all_reduce(x, dist.ReduceOp.MAX, group)
    return GOOD if bool(x.isnan().all()) else "NaN lost"


def _reduce_scatter(dtype: torch.dtype, rank: int, ranks: int, group: Group) -> str:
    x, out = _numbers(dtype, rank, 4 * ranks), torch.empty(4, dtype=dtype)
    dist.reduce_scatter_single(out, x, group=group)
    wanted = torch.stack([_numbers(torch.float64, other, 4 * ranks) for other in range(ranks)]).sum(0)
    return _same(out, wanted[4 * rank : 4 * rank + 4].to(dtype))


def _all_gather(dtype: torch.dtype, rank: int, ranks: int, group: Group) -> str:
    out = torch.empty(12 * ranks, dtype=dtype)
    dist.all_gather_single(out, _numbers(dtype, rank), group=group)
    return _same(out, torch.cat([_numbers(dtype, other) for other in range(ranks)]))


def _all_to_all(dtype: torch.dtype, rank: int, ranks: int, group: Group) -> str:
    x = _numbers(dtype, rank, 4 * ranks)
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x, group=group)
    parts = [_numbers(dtype, other, 4 * ranks)[4 * rank : 4 * rank + 4] for other in range(ranks)]
    return _same(out, torch.cat(parts))


def _broadcast(dtype: torch.dtype, rank: int, _: int, group: Group) -> str:
    x = _numbers(dtype, rank)
    dist.broadcast(x, 1, group)
    return _same(x, _numbers(dtype, 1))


def _ring(dtype: torch.dtype, rank: int, ranks: int, group: Group) -> str:
    x, out = _numbers(dtype, rank), torch.empty(12, dtype=dtype)
    works: list[Any] = [dist.isend(x, (rank + 1) % ranks, group), dist.irecv(out, (rank - 1) % ranks, group)]
    for work in works:
        work.wait()
    return _same(out, _numbers(dtype, (rank - 1) % ranks))


OPERATIONS: dict[str, Attempt] = {
    "all_reduce sum": _sum,
    "all_reduce max": _max,
    "reduce_scatter": _reduce_scatter,
    "all_gather": _all_gather,
    "all_to_all": _all_to_all,
    "broadcast": _broadcast,
    "send, recv": _ring,
}
