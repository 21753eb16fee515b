"""The output head and its loss in one operation that never holds all the logits.

The logits of GPT-2 at 4,096 tokens are 4096 × 50304: 0.4 GB in bf16, and the plain path keeps them several times over
(logits, log-probabilities, both gradients). Here a chunk of tokens at a time goes through logits, loss and gradients,
so that memory does not grow with the batch, and the element-wise part runs on a few rows at a time that stay in cache.
The gradients are those of a summed loss (unit scale); backward only multiplies them by what arrives.
"""

from __future__ import annotations

from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tozan.ops import native
from tozan.ops.compiler import eager
from tozan.ops.products import compute_dtype, product, usable

IGNORE = -100
"""The target of a token that is left out of the loss (PyTorch's own convention)."""

_CHUNK_ELEMENTS = {"cpu": 1 << 26, "cuda": 1 << 28}
_BLOCK_ELEMENTS = 1 << 20


def linear_cross_entropy_reference(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """What `linear_cross_entropy` computes, in plain PyTorch.

    Args:
        x: (N, D) activations.
        weight: (V, D) rows of the output head.
        targets: (N,) int64 token ids; -100 is left out.

    Returns:
        Scalar sum over tokens of -log p(target), in fp32 (fp64 for fp64 inputs).
    """
    logits = F.linear(x, weight)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")


@eager
def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Summed cross-entropy of the logits `x @ weight.T`, in chunks of tokens.

    Under autocast the products run in the autocast type; softmax and loss are fp32 always, and so are the gradients
    of fp32 inputs. In bf16 the products of the gradients take softmax - one-hot rounded to bf16, as the plain path
    does. In fp16 they run in fp32: a probability such as 1/50304 is below fp16's normal numbers and a sum over
    tokens can pass its largest, and CPUs gain nothing from fp16 (no loss scale reaches these products, since they
    are made at unit scale). Without gradients only the loss is computed.

    Args:
        x: (N, D) activations.
        weight: (V, D) rows of the output head.
        targets: (N,) int64 token ids; -100 is left out.

    Returns:
        Scalar sum over tokens of -log p(target), in fp32 (fp64 for fp64 inputs).

    Raises:
        RuntimeError: a target is outside the vocabulary and not -100 (on a GPU, which nobody waits for, the loss is
            NaN).
    """
    dtype = compute_dtype(x)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _LinearCrossEntropy.apply(x, weight, targets, dtype)  # type: ignore[no-any-return, no-untyped-call]
    with torch.no_grad():
        return _pass(x, weight, targets, dtype, None, None)


def _pass(
    x: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, dx: Tensor | None, dweight: Tensor | None
) -> Tensor:
    """Returns the summed loss and writes the gradients into `dx` (N, D) and `dweight` (V, D), each unless None."""
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    gradient_dtype = accumulate if dtype == torch.float16 else dtype
    loss = torch.empty(x.shape[0], dtype=accumulate, device=x.device)
    with torch.autocast(x.device.type, enabled=False):
        chunk = chunk_tokens(x.shape[0], weight.shape[0], x.device.type)
        if not usable(dtype, chunk, x, weight):  # then it is cast once, not in every chunk
            weight = weight.to(dtype)
        weight_again = weight.to(gradient_dtype) if dtype == torch.float16 else weight
        for start in range(0, x.shape[0], chunk):
            rows = slice(start, start + chunk)
            tokens = x[rows].to(dtype)
            logits = product(tokens, weight.T, dtype)
            if dx is None and dweight is None:
                _losses(logits, targets[rows], loss[rows], None)
                continue
            gradient = _losses(logits, targets[rows], loss[rows], gradient_dtype)
            if dx is not None:
                dx[rows] = product(gradient, weight_again, gradient_dtype, accumulate)
            if dweight is not None:
                product(gradient.T, tokens.to(gradient_dtype), gradient_dtype, into=dweight)
    return loss.sum()


def chunk_tokens(tokens: int, vocabulary: int, device: str = "cpu") -> int:
    """Tokens per chunk: at most 2²⁶ logits (128 MiB in bf16), on a GPU 2²⁸, and chunks of nearly equal size."""
    chunks = -(-tokens * vocabulary // _CHUNK_ELEMENTS[device])
    even = max(1, -(-tokens // max(1, chunks)))
    return even if device == "cpu" else -(-even // 128) * 128  # else a GPU's products find rows that are not aligned


@overload
def _losses(logits: Tensor, targets: Tensor, loss: Tensor, gradient_dtype: None) -> None: ...
@overload
def _losses(logits: Tensor, targets: Tensor, loss: Tensor, gradient_dtype: torch.dtype) -> Tensor: ...
def _losses(logits: Tensor, targets: Tensor, loss: Tensor, gradient_dtype: torch.dtype | None) -> Tensor | None:
    """Fills `loss` (N,) and returns softmax - one-hot (N, V), if a type is given, perhaps in the memory of `logits`."""
    gradient = None
    if gradient_dtype:
        gradient = logits if gradient_dtype == logits.dtype else torch.empty_like(logits, dtype=gradient_dtype)
    if logits.is_cuda and loss.dtype == torch.float32 and native.fuses_on_gpu():
        _on_gpu(logits, targets, loss, gradient)
        return gradient
    if native.usable(logits, gradient) and gradient_dtype in (None, logits.dtype):
        _require_ids(targets, logits.shape[1])
        ids = targets.contiguous()
        native.call("cross_entropy", logits.dtype, logits, *logits.shape, ids, IGNORE, loss, gradient)
        return gradient
    block = max(1, _BLOCK_ELEMENTS // logits.shape[1]) * (torch.get_num_threads() if logits.is_cpu else 64)
    for start in range(0, logits.shape[0], block):
        rows = slice(start, start + block)
        kept = targets[rows] != IGNORE
        index = targets[rows].where(kept, 0)[:, None]
        block_logits = logits[rows].to(loss.dtype)
        p = torch.softmax(block_logits, dim=-1)
        # log Σ exp(logits) from the largest logit and its p, which is never below 1/V: one exponential per logit.
        log_sum = block_logits.amax(dim=1) - p.amax(dim=1).log()
        loss[rows] = (log_sum - block_logits.gather(1, index)[:, 0]) * kept
        if gradient is not None:
            p.scatter_add_(1, index, p.new_full((), -1.0).expand(index.shape))
            if not kept.all():
                p *= kept[:, None]
            gradient[rows] = p
    return gradient


def _on_gpu(logits: Tensor, targets: Tensor, loss: Tensor, gradient: Tensor | None) -> None:
    """`_losses` by the kernel of `gpu_kernels.py`."""
    from tozan.ops.gpu_kernels import cross_entropy

    out = logits if gradient is None else gradient
    options = {"IGNORE": IGNORE, "WITH_GRADIENT": gradient is not None, "BLOCK": 8192}
    cross_entropy[len(logits),](logits, targets.contiguous(), loss, out, logits.shape[1], **options, num_warps=16)


def _require_ids(targets: Tensor, vocabulary: int) -> None:
    """Raises a RuntimeError if a target is neither a token's id nor left out, as PyTorch's operations do."""
    wrong = (targets != IGNORE) & ((targets < 0) | (targets >= vocabulary))
    if wrong.any():
        raise RuntimeError(f"target {int(targets[wrong][0])} is outside of the vocabulary of {vocabulary}")


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients together with the loss, where the logits are at hand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns the summed loss and saves both gradients."""
        accumulate = torch.float64 if dtype == torch.float64 else torch.float32
        dx = torch.empty_like(x, dtype=accumulate) if ctx.needs_input_grad[0] else None
        dweight = torch.zeros_like(weight, dtype=accumulate) if ctx.needs_input_grad[1] else None
        loss = _pass(x, weight, targets, dtype, dx, dweight)
        ctx.save_for_backward(dx, dweight)
        ctx.dtypes = x.dtype, weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Multiplies the saved gradients by what arrives, then gives them the types of the inputs."""
        x_dtype, weight_dtype = ctx.dtypes
        dx, dweight = ctx.saved_tensors
        scaled_x = None if dx is None else (dx * gradients[0]).to(x_dtype)
        scaled_weight = None if dweight is None else (dweight * gradients[0]).to(weight_dtype)
        return scaled_x, scaled_weight, None, None
