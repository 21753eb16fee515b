"""Debug mode: the ranks of a group compare what they are about to do.

gloo matches operations by their order only. Two asynchronous ones swapped on one rank, or equal bytes of another dtype,
give wrong numbers and no error; this finds them at the cost of one more message per operation.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

_BYTES = 256


class MismatchError(RuntimeError):
    """Ranks of a group started different operations."""


def compare(group: dist.ProcessGroup, ranks: tuple[int, ...], operation: str) -> None:
    """Raise on every rank of the group unless all of them pass the same text.

    Args:
        group: who compares.
        ranks: their global ranks, for the message.
        operation: sequence number, operation, name, shape and dtype.

    Raises:
        MismatchError: with each rank's operation.
    """
    text = operation.encode()[:_BYTES]
    mine = torch.zeros(_BYTES, dtype=torch.uint8)
    mine[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    rows = torch.empty(len(ranks) * _BYTES, dtype=torch.uint8)
    dist.all_gather_single(rows, mine, group=group)
    texts = [bytes(row.tolist()).rstrip(b"\0").decode(errors="replace") for row in rows.view(len(ranks), _BYTES)]
    if len(set(texts)) > 1:
        lines = "\n".join(f"  rank {rank} starts {text}" for rank, text in zip(ranks, texts, strict=True))
        raise MismatchError(f"ranks disagree about their next operation:\n{lines}")
