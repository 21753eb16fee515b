"""Embedding and cross-entropy where every rank has its part of the vocabulary only; logits are never gathered.

A rank's logits give, per token, their largest, the sum of their exponentials and, if it is among them, the target's.
These three numbers are all that the ranks exchange (Megatron, arXiv 1909.08053, section 3, exchanges as many in three
all-reduces). Gradients are made with the loss, a chunk of tokens at a time, as in `ops.linear_cross_entropy`, so no
chunk's logits outlive it.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tozan.comm import Axis, collectives
from tozan.ops.cross_entropy import IGNORE
from tozan.ops.products import compute_dtype

CHUNK_ELEMENTS = 1 << 24
"""Logits that a rank holds at a time (64 MiB in fp32)."""


class Head(Protocol):
    """How a scheme multiplies with its shard of the output head's weight (V, D); none of these tracks gradients.

    Attributes:
        axis: the axis that the vocabulary of the logits is sharded over, in equal parts.
    """

    axis: Axis

    def logits(self, x: Tensor, weight: Tensor) -> Tensor:
        """X·Wᵀ: this rank's part of the logits."""

    def input_gradient(self, gradient: Tensor, weight: Tensor) -> Tensor:
        """G·W, for gradients G of the logits: the gradient of X, or a part of it that the layer before X sums."""

    def weight_gradient(self, gradient: Tensor, x: Tensor) -> Tensor:
        """Gᵀ·X: the gradient of W."""


def own_rows(tokens: Tensor, weight: Tensor, axis: Axis) -> Tensor:
    """Looks tokens up in this rank's rows of an embedding; other ranks' tokens give zeros, so that a sum has all.

    Args:
        tokens: int64 ids of the whole vocabulary.
        weight: this rank's equal part of the rows.
        axis: the axis that the rows are sharded over.
    """
    index = tokens - axis.index * weight.shape[0]
    elsewhere = (index < 0) | (index >= weight.shape[0])
    return F.embedding(index.masked_fill(elsewhere, 0), weight).masked_fill(elsewhere[..., None], 0.0)


def sharded_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, head: Head, vocabulary: int) -> Tensor:
    """Summed cross-entropy of sharded logits.

    Args:
        x: (N, D) activations, in the scheme's local form.
        weight: this rank's shard of the output head.
        targets: (N,) int64 ids of the whole vocabulary; -100 is left out.
        head: the scheme's products.
        vocabulary: rows of the whole head (V).

    Returns:
        Scalar sum over these N tokens of -log p(target), in fp32 (fp64 for fp64 inputs); the same on every rank of
        `head.axis`.

    Raises:
        RuntimeError: a target is outside the vocabulary and not -100.
    """
    kept = targets != IGNORE
    if not torch.all(~kept | ((targets >= 0) & (targets < vocabulary))):
        raise RuntimeError(f"a target is outside the vocabulary of {vocabulary} and is not {IGNORE}")
    dtype = compute_dtype(x)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _Loss.apply(x, weight, targets, head, vocabulary, dtype)  # type: ignore[no-any-return, no-untyped-call]
    with torch.no_grad():
        return _pass(x, weight, targets, head, vocabulary, dtype, None, None)


class _Loss(torch.autograd.Function):
    """Makes the gradients with the loss, where the logits are at hand."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, head: Head, vocabulary: int, dtype: torch.dtype
    ) -> Tensor:
        """The summed loss."""
        wide = _at_least_fp32(dtype)
        dx = torch.empty_like(x, dtype=wide) if ctx.needs_input_grad[0] else None
        dweight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        loss = _pass(x, weight, targets, head, vocabulary, dtype, dx, dweight)
        ctx.save_for_backward(dx, dweight)
        ctx.dtypes = x.dtype, weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        """Scales the gradients in place; autograd's version counter refuses a second backward."""
        dx, dweight = ctx.saved_tensors
        x_dtype, weight_dtype = ctx.dtypes
        scaled_x = None if dx is None else dx.mul_(gradients[0]).to(x_dtype)
        scaled_weight = None if dweight is None else dweight.mul_(gradients[0]).to(weight_dtype)
        return scaled_x, scaled_weight, None, None, None, None


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _pass(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    head: Head,
    vocabulary: int,
    dtype: torch.dtype,
    dx: Tensor | None,
    dweight: Tensor | None,
) -> Tensor:
    """The summed loss; writes the gradients at unit scale into `dx` and `dweight` unless they are None.

    As in `ops.linear_cross_entropy`, the products of the gradients run in fp32 where the others run in fp16.
    """
    again = torch.float32 if dtype == torch.float16 else dtype
    part = vocabulary // head.axis.size
    chunk = max(1, CHUNK_ELEMENTS // part)
    losses = []
    with torch.autocast(x.device.type, enabled=False):
        cast = weight.to(dtype)
        weight_again, weight = cast if again == dtype else weight.to(again), cast
        for start in range(0, x.shape[0], chunk):
            rows = slice(start, start + chunk)
            tokens = x[rows].to(dtype)
            logits = head.logits(tokens, weight)
            wanted = dx is not None or dweight is not None
            loss, gradient = softmax_loss(logits, targets[rows], head.axis.index * part, head.axis, wanted)
            losses.append(loss)
            if gradient is None:
                continue
            gradient = gradient.to(again)
            if dx is not None:
                dx[rows] = head.input_gradient(gradient, weight_again)
            if dweight is not None:
                dweight += head.weight_gradient(gradient, tokens.to(again))
    return torch.cat(losses).sum()


def softmax_loss(
    logits: Tensor, targets: Tensor, first: int, axis: Axis, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Losses of some tokens from this rank's logits.

    Args:
        logits: (N, V/n).
        targets: (N,) ids of the whole vocabulary.
        first: the vocabulary's id of the first logit.
        axis: the n ranks that have the other logits of the same tokens.
        with_gradient: whether to make it.

    Returns:
        Losses (N,) in fp32 at least, zero where the target is left out, and the gradient of their sum with respect
        to the logits, (N, V/n): softmax − one-hot.
    """
    wide = logits.to(_at_least_fp32(logits.dtype))
    kept, index = targets != IGNORE, targets - first
    here = (index >= 0) & (index < logits.shape[1])
    index = index.where(here, 0)[:, None]
    largest = wide.amax(dim=-1)
    exponentials = (wide - largest[:, None]).exp_()
    mine = torch.stack((largest, exponentials.sum(dim=-1), wide.gather(1, index)[:, 0] * here))
    largest_of, sums, target = collectives.all_gather(mine[None], axis, dim=0, name="softmax statistics").unbind(1)
    top = largest_of.amax(dim=0)
    total = (sums * (largest_of - top).exp_()).sum(dim=0)
    losses = (top + total.log() - target.sum(dim=0)) * kept
    if not with_gradient:
        return losses, None
    gradient = exponentials.mul_(((largest - top).exp_() / total)[:, None])
    gradient.scatter_add_(1, index, -here.to(gradient.dtype)[:, None])
    return losses, gradient.mul_(kept[:, None]) if not kept.all() else gradient
