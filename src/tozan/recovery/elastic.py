"""Which layout a run takes when there are fewer ranks than it was made for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tozan.config import load
from tozan.errors import UserError


@dataclass(frozen=True)
class Shape:
    """Ranks of a generation, and the flags that make the config fit them.

    Attributes:
        ranks: their number.
        flags: `--table.key=value`, to follow the user's own.
    """

    ranks: int
    flags: tuple[str, ...] = ()


def fitting(config: Path, flags: Sequence[str], available: int) -> Shape | None:
    """The layout nearest to the config's own for at most `available` ranks; None if there is none.

    Global batch and micro-batch stay, and with them the samples of every step and, in layouts of replicas, ZeRO and
    pipelines, every bit. Replicas are given up first, then pipeline stages, then tensor parallelism.

    Args:
        config: the TOML file.
        flags: the user's flags.
        available: ranks that can be had.
    """
    own = load(config, flags).config
    if own.layout.processes <= available:
        return Shape(own.layout.processes)
    for data, pipeline, tensor in _candidates(own.layout.data, own.layout.pipeline, own.layout.tensor, available):
        micro_batches = (own.train.global_batch or 1) // (own.train.micro_batch or 1)
        if micro_batches % data:
            continue
        change = (
            f"--layout.data={data}",
            f"--layout.pipeline={pipeline}",
            f"--layout.tensor={tensor}",
            f"--train.global_batch={own.train.global_batch}",
            f"--train.micro_batch={own.train.micro_batch}",
            f"--train.accumulate={micro_batches // data}",
        )
        try:
            load(config, [*flags, *change])
        except UserError:
            continue
        return Shape(data * pipeline * tensor, change)
    return None


def _candidates(data: int, pipeline: int, tensor: int, available: int) -> Iterator[tuple[int, int, int]]:
    """(data, pipeline, tensor) that fit, those that give up least first."""
    for t in _downward(tensor):
        for p in _downward(pipeline):
            for d in range(min(data, available // (p * t)), 0, -1):
                yield d, p, t


def _downward(size: int) -> list[int]:
    """The divisors of a size, the largest first."""
    return [divisor for divisor in range(size, 0, -1) if size % divisor == 0]
