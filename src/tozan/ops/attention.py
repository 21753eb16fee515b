"""Causal attention: one kernel for each direction where there is one for the processor, else a few batched products.

The kernel (`attention.h`; on AVX-512 with bf16 dot products in fp32 and bf16, on AMX in bf16) takes a head at a time
through products and softmax, so that no scores ever leave the cache and only the causal half is computed. It keeps of
each query the logarithm of the sum of its exponentials, from which backward makes the probabilities again, as
FlashAttention-2 does (Dao, 2023, arXiv 2307.08691).

Elsewhere blocks of queries of all heads of a sample go through batched products, which PyTorch's libraries do at a
higher rate than its own fused kernel does its small ones; backward makes the scores again from queries and keys.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tozan.ops import fused, native
from tozan.ops.compiler import operation

BLOCKED_FROM = 128
"""Tokens from which blocks of batched products were measured to be faster than PyTorch's kernel on CPUs, in bf16."""


def pays(q: Tensor) -> bool:
    """Whether `causal_attention` is faster than PyTorch's own for these queries (B, H, T, S)."""
    return q.is_cpu and q.shape[2] >= BLOCKED_FROM and (q.dtype == torch.bfloat16 or fused.usable(q))


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


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of each token over itself and the tokens before it.

    Softmax, its gradient and all sums are computed in fp32 at least; what enters a product is rounded to the type of
    the inputs (without the kernel so are the scores). torch.compile takes it as one operation.

    Args:
        q: queries (B, H, T, S), on the CPU.
        k: keys (B, K, T, S), where K divides H.
        v: values (B, K, T, S).

    Returns:
        (B, H, T, S), in memory as (B, T, H, S).
    """
    return _attention(q, k, v)[0]


@operation("tozan::causal_attention")
def _attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The output and, for the kernel's backward pass, (B, H, T) logarithms of sums; without the kernel these are 0."""
    if fused.usable(q):
        output, logs = empty_output(q), q.new_empty(q.shape[:3], dtype=torch.float32)
        fused.forward(q, k, v, output, logs)
        return output, logs
    return blocks(q, k, v), q.new_zeros(q.shape[:3], dtype=torch.float32)


@operation("tozan::causal_attention_backward")
def _backward(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, logs: Tensor) -> Tensor:
    """Gradients of q, k and v, side by side for each token: (B, T, H + 2K, S)."""
    gradients = empty_gradients(q, k)
    if fused.usable(q):
        fused.backward(dy, q, k, v, y, logs, split_gradients(gradients, k))
    else:
        blocks_backward(dy, q, k, v, *split_gradients(gradients, k))
    return gradients


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    return empty_output(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@_backward.register_fake
def _(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, logs: Tensor) -> Tensor:  # noqa: ARG001
    return empty_gradients(q, k)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    """Keeps for the backward pass what the kernel wants; the output is kept by the next product anyway."""
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, y, logs = ctx.saved_tensors
    return split_gradients(_backward(dy, q, k, v, y, logs), k)


_attention.register_autograd(_gradients, setup_context=_keep)


def split_heads(x: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    """`torch.split` of the heads (dim 1); gradients that lie side by side in memory already are not copied.

    Args:
        x: (B, heads, T, S).
        sizes: heads of each part.
    """
    return _Split.apply(x, sizes)  # type: ignore[no-any-return, no-untyped-call]


class _Split(torch.autograd.Function):
    """As `torch.split`, whose gradient is a copy of all parts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:  # noqa: ARG004
        return torch.split(x, sizes, dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *parts: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return _together(parts), None


def _together(parts: tuple[Tensor, ...]) -> Tensor:
    """The parts in one tensor along dim 1: the memory that they lie in, if they do so one behind the other."""
    first, heads = parts[0], sum(part.shape[1] for part in parts)
    if torch.compiler.is_compiling():
        return torch.cat(parts, dim=1)
    at = first.storage_offset()
    for part in parts:
        same = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not same or part.stride() != first.stride() or part.storage_offset() != at:
            return torch.cat(parts, dim=1)
        at += part.shape[1] * part.stride(1)
    return first.as_strided((first.shape[0], heads, *first.shape[2:]), first.stride(), first.storage_offset())


def empty_gradients(q: Tensor, k: Tensor) -> Tensor:
    """Room for the gradients of q, k and v, as the projection that made them wants them."""
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1] + 2 * k.shape[1], q.shape[3])


def split_gradients(gradients: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Those of q, k and v, each (B, heads, T, S)."""
    kv_heads = k.shape[1]
    sizes = [gradients.shape[2] - 2 * kv_heads, kv_heads, kv_heads]
    dq, dk, dv = torch.split(gradients.transpose(1, 2), sizes, dim=1)
    return dq, dk, dv


def blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The output by batched products."""
    heads, tokens, size = q.shape[1:]
    output = empty_output(q)
    for sample in range(q.shape[0]):
        grouped = q[sample].view(k.shape[1], -1, tokens, size)
        keys, values = k[sample].contiguous(), v[sample].contiguous()
        for first, end in query_blocks(tokens):
            p = _probabilities(grouped[:, :, first:end], keys[:, :end], first)
            output[sample, :, first:end] = torch.bmm(p, values[:, :end]).view(heads, end - first, size)
    return output


def blocks_backward(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
    """Writes the gradients of q, k and v, by batched products."""
    kv_heads, tokens, size = k.shape[1:]
    scale = 1.0 / math.sqrt(size)
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


def empty_output(q: Tensor) -> Tensor:
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
