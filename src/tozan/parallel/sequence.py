"""Sequence parallelism (Korthikanti et al., arXiv 2205.05198): T/n tokens per rank outside the products.

An option of the 1D scheme on n ranks. Norms, residual sums and learned positions then hold and do 1/n of the work. The
all-reduce at the end of a row-parallel product becomes a reduce-scatter over tokens, and the identity at the beginning
of a column-parallel one an all-gather, each the other's gradient; an all-reduce is such a pair, so the bytes stay the
same. Parameters of norms, positions and row-parallel biases are whole on every rank but see T/n tokens: their
gradients are parts, summed once per step.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from tozan.comm import Axis
from tozan.errors import Problem, UserError
from tozan.parallel.scheme import Parameters


class SequencePosition(nn.Module):
    """Learned positions of this rank's tokens: (T,) int64 to (T/n, D)."""

    def __init__(self, parameters: Parameters, axis: Axis) -> None:
        super().__init__()
        self.weight = parameters["weight"]
        self._axis = axis

    def forward(self, positions: Tensor) -> Tensor:
        """Looks up this rank's contiguous n-th of `positions`."""
        return F.embedding(positions.chunk(self._axis.size, dim=-1)[self._axis.index], self.weight)


def check_tokens(tokens: int, ranks: int) -> None:
    """Refuses a sequence that does not split.

    Raises:
        UserError: `tokens` is no multiple of `ranks`.
    """
    if tokens % ranks:
        problem = f"{tokens} tokens over {ranks} ranks leaves {tokens % ranks} over"
        raise UserError(Problem("sequence parallelism", problem, f"use a sequence that is a multiple of {ranks}"))
