"""Causal attention in half precision as a few batched matrix products per block of queries.

PyTorch's fused CPU kernel runs its small products far below the speed of the library's large ones: on a processor with
AVX512-BF16 and without AMX it needs 1.4 times as long as what is here, forward and backward together. A block of
queries of all heads of a sample goes through product, softmax and product at once, so that the scores stay in cache
and only the causal half (rounded up to blocks) is computed. Nothing but queries, keys and values is kept; backward
makes the scores again.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tozan.ops import native
from tozan.ops.compiler import operation


def causal_attention_reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What `causal_attention` computes, by PyTorch's own operation.

    Args:
        q: queries (B, H, T, S).
        k: keys (B, K, T, S), where K divides H.
        v: values (B, K, T, S).

    Returns:
        (B, H, T, S).
    """
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


@operation("tozan::causal_attention")
def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of each token over itself and the tokens before it.

    Scores are rounded to the type of the inputs, as products of that type are; softmax and its gradient are computed
    in fp32, and so are the sums over blocks. torch.compile takes it as one operation.

    Args:
        q: queries (B, H, T, S), on the CPU.
        k: keys (B, K, T, S), where K divides H.
        v: values (B, K, T, S).

    Returns:
        (B, H, T, S), in memory as (B, T, H, S).
    """
    heads, tokens, size = q.shape[1:]
    output = _empty_output(q)
    for sample in range(q.shape[0]):
        grouped = q[sample].view(k.shape[1], -1, tokens, size)
        keys, values = k[sample].contiguous(), v[sample].contiguous()
        for first, end in query_blocks(tokens):
            p = _probabilities(grouped[:, :, first:end], keys[:, :end], first)
            output[sample, :, first:end] = torch.bmm(p, values[:, :end]).view(heads, end - first, size)
    return output


@operation("tozan::causal_attention_backward")
def _backward(dy: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from that of the output."""
    kv_heads, tokens, size = k.shape[1:]
    scale = 1.0 / math.sqrt(size)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for sample in range(q.shape[0]):
        queries, arriving = (tensor[sample].view(kv_heads, -1, tokens, size) for tensor in (q, dy))
        keys, values = k[sample].contiguous(), v[sample].contiguous()
        sum_k, sum_v = (keys.new_zeros(keys.shape, dtype=torch.promote_types(q.dtype, torch.float32)) for _ in "kv")
        for first, end in query_blocks(tokens):
            block = queries[:, :, first:end]
            p = _probabilities(block, keys[:, :end], first)
            dy_block = arriving[:, :, first:end].reshape(kv_heads, -1, size)
            sum_v[:, :end] += torch.bmm(p.transpose(1, 2), dy_block)
            dp = torch.bmm(dy_block, values[:, :end].transpose(1, 2))
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
            dq[sample, :, first:end] = torch.bmm(ds, keys[:, :end]).mul_(scale).view(-1, end - first, size)
            sum_k[:, :end] += torch.bmm(ds.transpose(1, 2), block.reshape(kv_heads, -1, size))
        dk[sample], dv[sample] = sum_k.mul_(scale), sum_v
    return dq, dk, dv


@causal_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # noqa: ARG001
    return _empty_output(q)


@_backward.register_fake
def _(dy: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ARG001
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG001
    """Keeps queries, keys and values for the backward pass."""
    ctx.save_for_backward(*inputs)


causal_attention.register_autograd(lambda ctx, dy: _backward(dy, *ctx.saved_tensors), setup_context=_keep)


def _empty_output(q: Tensor) -> Tensor:
    """Room for the output (B, H, T, S) where the heads of a token lie side by side, as the next product wants them."""
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)


def query_blocks(tokens: int) -> list[tuple[int, int]]:
    """First and end position of each block of queries: 256 of them, 128 in short samples (measured)."""
    block = 256 if tokens >= 1024 else 128
    return [(first, min(first + block, tokens)) for first in range(0, tokens, block)]


def _probabilities(q: Tensor, k: Tensor, first: int) -> Tensor:
    """Softmax over the keys of a block of queries.

    Args:
        q: (K, G, R, S), the queries at positions first … first + R - 1, G heads to each key head.
        k: (K, first + R, S).
        first: position of the first query.

    Returns:
        (K, G·R, first + R).
    """
    kv_heads, group, rows, size = q.shape
    flat = q.reshape(kv_heads, group * rows, size)
    scores = torch.baddbmm(flat.new_empty(()), flat, k.transpose(1, 2), beta=0.0, alpha=1.0 / math.sqrt(size))
    if native.usable(scores):
        sizes = kv_heads * group * rows, rows, first, first + rows
        native.call("causal_softmax", scores.dtype, scores, *sizes)
        return scores
    future = scores.new_full((rows, rows), -math.inf).triu_(1)
    scores.view(kv_heads, group, rows, first + rows)[..., first:].add_(future)
    return torch.softmax(scores, dim=-1)
