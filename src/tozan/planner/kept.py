"""Bytes that one block of tozan's trainer keeps for its backward pass, for one layout or for thousands at once.

Counted tensor by tensor from what autograd saves; tests hold it to that.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tozan.models.arithmetic import Shape
from tozan.planner.candidates import Floats
from tozan.planner.kernels import Sizes


@dataclass(frozen=True)
class Kept:
    """Bytes by what is recomputed."""

    none: Floats
    selective: Floats
    full: Floats


def kept(
    shape: Shape, tokens: Sizes, item: int, word: int, *, tp: Sizes, grid: Sizes, sequence_parallel: Sizes
) -> Kept:
    """What one block keeps of one micro-batch, weights and their 16-bit copies apart.

    Args:
        shape: the model's sizes.
        tokens: of the micro-batch on one rank, before tensor parallelism.
        item: bytes of an activation in the compute type.
        word: bytes of an element of the residual stream.
        tp: ranks of tensor parallelism.
        grid: side of its grid; 0 for the 1D scheme.
        sequence_parallel: whether the 1D scheme shards the residual stream.
    """
    tokens, tp, grid = (np.asarray(size, dtype=float) for size in (tokens, tp, grid))
    shared, square, gated = np.asarray(sequence_parallel) > 0, grid > 0, shape.family == "llama"
    stream = tokens * shape.width / np.where(square | shared, tp, 1)
    inner = tokens * shape.mlp_width / tp
    # Queries, keys, values, and the heads' output, which the next product keeps.
    heads = tokens * (2 * shape.width + 2 * shape.kv_width) / tp
    # Norms keep their input; over a grid their normalized input, too.
    norms = stream * word * np.where(square, 4, 2)
    casts = 2 * stream * item  # what norms return
    gathered = np.where(shared, 2 * tokens * shape.width * item, 0.0)
    logs = 4 * tokens * shape.heads / tp  # of each query's sum of exponentials
    everything = norms + casts + gathered + item * (heads + (3 if gated else 2) * inner) + logs
    light = item * inner + (stream * (item + np.where(square, word, 0)) if gated else casts)
    return Kept(everything, everything - light, stream * word)
