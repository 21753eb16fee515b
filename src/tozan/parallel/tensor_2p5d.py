"""2.5D tensor parallelism (Tesseract, Wang et al., arXiv 2105.14500): d grids of q×q ranks.

Every grid holds all weights in blocks as in 2D, and works on its own d-th of the samples, so activations are in q·d × q
blocks. The SUMMA products stay inside a grid: with p = q²·d ranks, q is smaller than √p and so are the panels' trips.
The price is d copies of the weights, and one sum of their gradients over depth per step. Depth 1 is 2D; the layers are
shared with it.
"""

from __future__ import annotations

from tozan.parallel.tensor_2d import Tensor2D


class Tensor2p5D(Tensor2D):
    """The scheme: `Tensor2D` with tokens sharded over `tp_depth` too, over which weights are replicated."""

    axes = ("tp_depth", "tp_row", "tp_col")
    token_axes = ("tp_depth", "tp_row")
