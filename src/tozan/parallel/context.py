"""Context parallelism: the n ranks of an axis share every sequence, and attend to all of it in a ring.

A rank holds two of 2n pieces of each sequence, one from either end (`layout.split_sequence`). A causal token attends to
all before it, so an early piece is cheap and a late one dear; together they cost the same on every rank. Everything but
attention works on single tokens and needs no change, beside learned and rotary positions, which are those of the
rank's own tokens.

Attention goes round (Ring Attention, arXiv 2310.01889): in step s a rank has the keys and values of the rank s before
it and computes its queries' block of attention with them, while those for the next step travel. The early piece of an
earlier rank is seen by all of its queries, both pieces of a later rank by its late queries: half of a whole block in
every step, and nothing is computed to be masked away. Blocks are put together by the logarithms of their sums of
exponentials, as in flash attention (arXiv 2205.14135), in fp32 at least.

Backward, keys and values go round once more, and their gradients follow: every rank adds its part, and the last one
sends them home. Per layer and micro-batch a rank sends, for B samples of T tokens and K key/value heads of size S on
it, 2·B·K·S·(T/n)·(n-1) elements forward and twice that backward, the gradients in fp32 at least.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tozan.comm import Axis, collectives
from tozan.layout import split_sequence
from tozan.models.layers import Attention, Rotary
from tozan.ops.compiler import eager

TOKENS = 2
"""The dim of heads (B, H, T, S) that the ranks share."""


def own_tokens(length: int, axis: Axis) -> Tensor:
    """Which of a sequence's tokens this rank holds, in order: (length / n,) int64."""
    early, late = split_sequence(length, axis.size, axis.index)
    return torch.tensor([*early, *late])


def apply(model: nn.Module, axis: Axis, length: int) -> None:
    """Make a model compute with this rank's tokens of sequences that the ranks of an axis share; in place.

    After `apply.apply`, if there is tensor parallelism. Weights stay whole on every rank, and their gradients are the
    parts of this rank's tokens.

    Args:
        model: tozan's own: with `layers.Attention`, and positions that are rotary or looked up in `position`.
        axis: the mesh's `cp`; with one rank nothing changes.
        length: tokens in a whole sequence, a multiple of 2n; all sequences have it.
    """
    if axis.size == 1:
        return
    own = own_tokens(length, axis)
    for module in model.modules():
        if isinstance(module, Attention):
            module.attend = partial(ring_attention, axis=axis, tokens=len(own))
        elif isinstance(module, Rotary):
            module.cos, module.sin = module.cos[own], module.sin[own]
    position = getattr(model, "position", None)
    if position is not None:
        position.register_forward_pre_hook(lambda _, arguments: (own.to(arguments[0].device)[arguments[0]],))


@eager
def ring_attention(q: Tensor, k: Tensor, v: Tensor, *, axis: Axis, tokens: int | None = None) -> Tensor:
    """Causal attention of this rank's queries over the keys and values of all ranks.

    Args:
        q: (B, H, T/n, S), of this rank's tokens (`own_tokens`).
        k: (B, K, T/n, S), where K divides H.
        v: (B, K, T/n, S).
        axis: the n ranks.
        tokens: what T/n must be, if it is known.

    Returns:
        (B, H, T/n, S).

    Raises:
        ValueError: another number of tokens, keys that are not those of the queries' tokens, or an odd number.
    """
    lengths = q.shape[TOKENS], k.shape[TOKENS]
    if lengths[0] != lengths[1] or lengths[0] % 2 or tokens not in (None, lengths[0]):
        wanted = f"{tokens} each" if tokens else "an even number of each"
        raise ValueError(f"ring attention: {lengths[0]} queries and {lengths[1]} keys, where a rank has {wanted}")
    return _Ring.apply(q, k, v, axis)  # type: ignore[no-any-return, no-untyped-call]


class _Ring(torch.autograd.Function):
    """The ring, forward and backward."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, axis: Axis) -> Tensor:
        """Attention, block by block."""
        visitors = torch.stack((k, v))
        wide = torch.promote_types(q.dtype, torch.float32)
        out, logs = q.new_empty(0), q.new_empty(0)
        for step in range(axis.size):
            coming = _pass_on(visitors, axis) if step < axis.size - 1 else None
            rows, columns = _block(step, axis, q.shape[TOKENS])
            part, part_logs = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q[:, :, rows], visitors[0][:, :, columns], visitors[1][:, :, columns], 0.0, step == 0
            )
            if step == 0:
                out, logs = part.to(wide), part_logs
            else:
                merge(out[:, :, rows], logs[:, :, rows], part, part_logs)
            visitors = coming.wait() if coming else visitors
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, logs)
        ctx.axis = axis
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor, Tensor, None]:
        """Gradients of queries, and of this rank's keys and values, which the other ranks have a part in."""
        q, k, v, out, logs = ctx.saved_tensors
        axis, dy = ctx.axis, gradients[0]
        visitors, homeward = torch.stack((k, v)), None
        wide = torch.promote_types(q.dtype, torch.float32)
        dq, own = torch.zeros_like(q, dtype=wide), torch.zeros_like(visitors, dtype=wide)
        for step in range(axis.size):
            coming = _pass_on(visitors, axis) if step < axis.size - 1 else None
            rows, columns = _block(step, axis, q.shape[TOKENS])
            saved = (t[:, :, rows] for t in (dy, q)), (t[:, :, columns] for t in visitors), (out[:, :, rows],)
            dq_part, *parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *(t for group in saved for t in group), logs[:, :, rows], 0.0, step == 0
            )
            dq[:, :, rows] += dq_part
            theirs = own if step == 0 else torch.zeros_like(own)
            theirs[:, :, :, columns] = torch.stack(parts).to(wide)
            if step > 0:
                theirs += homeward.wait() if homeward else 0
                homeward = collectives.shift_async(theirs, axis, name="gradients of keys and values")
            visitors = coming.wait() if coming else visitors
        if homeward:
            own += homeward.wait()
        return dq.to(q.dtype), own[0].to(k.dtype), own[1].to(v.dtype), None


def _pass_on(visitors: Tensor, axis: Axis) -> collectives.Handle:
    """Keys and values on their way to the next rank, and those of the previous one on theirs to this."""
    return collectives.shift_async(visitors, axis, name="keys and values")


def _block(step: int, axis: Axis, tokens: int) -> tuple[slice, slice]:
    """Which of this rank's queries see which of the keys that it has in a step, without a mask but in step 0.

    With `split_sequence` both pieces of a later rank lie between the two of this one; of an earlier rank, the early
    piece lies before both and the late one after both.
    """
    everything, half = slice(0, tokens), tokens // 2
    if step == 0:
        return everything, everything
    earlier = step <= axis.index
    return (everything, slice(0, half)) if earlier else (slice(half, tokens), everything)


def merge(out: Tensor, logs: Tensor, part: Tensor, part_logs: Tensor) -> None:
    """Add a block of attention to `out` (B, H, R, S) and `logs` (B, H, R), in place."""
    total = torch.logaddexp(logs, part_logs)
    out.mul_((logs - total).exp_()[..., None]).add_(part * (part_logs - total).exp_()[..., None])
    logs.copy_(total)
