"""Bytes that a training step must move beside its matrix products: the memory's floor under a step; torch-free.

Every tensor that passes between two matrix products is counted as read once and written once, as if all element-wise
work between them were one pass: norm with the residual addition before it, activation alone, loss in place of the
logits, AdamW with the gradient's scaling. Softmax stays in cache. The residual stream and what AdamW keeps are fp32.
Bytes that matrix products move themselves are part of their measured rates.
"""

from __future__ import annotations

from tozan.models.arithmetic import Shape, block_matrices, parameters

_FP32 = 4


def step_bytes(shape: Shape, micro_batch: int, micro_batches: int, element: int) -> dict[str, int]:
    """Bytes of each phase of a step, read and written ones together.

    Args:
        shape: the model.
        micro_batch: samples in one forward pass.
        micro_batches: forward passes in a step.
        element: bytes of an element in the compute type: 2 for bf16 and fp16, 4 for fp32.

    Returns:
        `{"forward": …, "backward": …, "optimizer": …}`; the loss and its gradient count as forward, where the trainer
        makes them.
    """
    width, inner, e = shape.width, shape.mlp_width, element
    tokens = micro_batch * shape.sequence
    weights = shape.layers * sum(a * b for a, b in block_matrices(shape).values()) + shape.vocabulary * width
    rotary = 2 * e * (width + shape.kv_width) if shape.family == "llama" else 0
    into, out = (1, 1) if shape.family == "gpt2" else (2, 1)  # what the activation reads and writes, × inner

    # Norm and residual: the branch and the stream in, the stream and the next product's operand out.
    forward = 2 * (2 * _FP32 + 2 * e) * width + (into + out) * e * inner + rotary
    # The gradient of the norm's result, the stream and its gradient in; that gradient and the next operand out.
    backward = 2 * (3 * _FP32 + 2 * e) * width + (2 * into + out) * e * inner + rotary
    forward = tokens * (shape.layers * forward + 2 * _FP32 * width + 2 * e * shape.vocabulary)
    backward = tokens * (shape.layers * backward + 2 * _FP32 * width)
    if e < _FP32:  # weights to the compute type, their gradients back
        forward += (_FP32 + e) * weights
        backward += (_FP32 + e) * weights
    accumulate = (micro_batches - 1) * 2 * _FP32 * weights
    return {
        "forward": micro_batches * forward,
        "backward": micro_batches * backward + accumulate,
        "optimizer": (1 + 4 + 3) * _FP32 * parameters(shape),  # the norm; AdamW reads p, g, m, v, writes p, m, v
    }
