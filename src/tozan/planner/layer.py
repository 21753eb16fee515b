"""Seconds that one transformer block takes on one rank, forward and backward, by what it does.

Backward costs follow from forward ones operation by operation, not by a factor of two: a matrix product has two in
backward, of other shapes; element-wise operations move other amounts; fused attention recomputes its scores.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tozan.models.arithmetic import Shape, block_matrices
from tozan.planner import collectives, kernels
from tozan.planner.candidates import Candidates, Floats
from tozan.planner.machine import Machine, Precision
from tozan.planner.stacks import Stack

COLLECTIVE = 2.0
"""Host work of one tensor-parallel collective, in operations: an autograd function, its checks, streams and the launch.
Fitted to calibration rows."""
SOFTMAX_BATCHES = 4
"""Megatron's fused softmax takes score matrices four at a time; where a rank has another number of them (samples × its
heads), scale, mask and softmax run apart (`is_kernel_available` in megatron/model/fused_softmax.py)."""
SOFTMAX_OPERATIONS = 6.0
"""Operations more that it then is: scale, mask, two casts, softmax, dropout instead of one and dropout."""
KINDS = ("matrix", "attention", "elementwise", "tensor")


@dataclass(frozen=True)
class Job:
    """What is to be priced, apart from the layout.

    Attributes:
        shape: the model's sizes.
        machine: what it runs on.
        stack: what runs it.
        global_batch: samples of one optimizer step.
        precision: compute type.
    """

    shape: Shape
    machine: Machine
    stack: Stack
    global_batch: int
    precision: Precision = "bf16"

    @property
    def item(self) -> int:
        """Bytes of one activation."""
        return kernels.ITEM[self.precision]


@dataclass(frozen=True)
class Block:
    """Seconds of one block for one micro-batch, each a dict over `KINDS`; and operations issued by the host.

    `again` is what the backward pass repeats of the forward pass (recomputation).
    """

    forward: dict[str, Floats]
    backward: dict[str, Floats]
    again: dict[str, Floats]
    weights: Floats
    """The part of `backward` spent on weight gradients, which a zero-bubble schedule may put off."""


def tokens(job: Job, c: Candidates) -> Floats:
    """Tokens of one micro-batch on one rank before tensor parallelism."""
    return c.micro_batch * job.shape.sequence / c.cp


def block(job: Job, c: Candidates) -> Block:
    """Price one block for every candidate."""
    forward_matrix, backward_matrix, weights = _matrices(job, c)
    forward_attention, backward_attention = _attention(job, c)
    forward_element, backward_element, scores_element = _elementwise(job, c)
    forward_tensor, backward_tensor = _tensor(job, c)
    forward = dict(
        zip(
            KINDS, (forward_matrix, forward_attention, forward_element + scores_element[0], forward_tensor), strict=True
        )
    )
    backward = dict(
        zip(
            KINDS,
            (backward_matrix, backward_attention, backward_element + scores_element[1], backward_tensor),
            strict=True,
        )
    )
    full, selective = c.recompute == 2, c.recompute == 1
    again = {kind: np.where(full, forward[kind], 0.0) for kind in KINDS}
    if job.stack.selective == "attention" and not job.stack.flash:
        again["attention"] = again["attention"] + np.where(selective, forward_attention, 0.0)
        again["elementwise"] = again["elementwise"] + np.where(selective, scores_element[0], 0.0)
    elif job.stack.selective == "mlp":
        # Norms and activations are made again, no product is (see parallel/recompute.py).
        again["elementwise"] = again["elementwise"] + np.where(selective, forward_element, 0.0)
    return Block(forward, backward, again, weights)


def operations(job: Job, c: Candidates) -> tuple[Floats, Floats]:
    """Operations that the host issues for one block, forward and backward (counted in the programs' source).

    A fused block: 2 norms, 4 products with their bias, 3 to 6 for attention and its layout, 1 activation, 2 residuals,
    4 views that copy. Autograd issues about 1.7 in backward for each.
    """
    forward = 30.0 + (0 if job.stack.flash else 6) + (0 if job.stack.fused else 10)
    if job.stack.flash or not job.stack.fused:
        return np.full(1, forward), np.full(1, 1.7 * forward)
    found = forward + SOFTMAX_OPERATIONS * _apart(job, c)
    return found, 1.7 * found


def _apart(job: Job, c: Candidates) -> Floats:
    """1 where Megatron's fused softmax does not take the number of score matrices that a rank has, else 0."""
    return np.where(c.micro_batch * job.shape.heads / c.tp % SOFTMAX_BATCHES, 1.0, 0.0)


def _product(job: Job, c: Candidates, outputs: int, inputs: int, kind: str = "col") -> Floats:
    """Seconds of one forward product of a block, on whichever scheme the candidate uses."""
    n, device = tokens(job, c), job.machine.device
    columns = np.where(kind == "row", outputs, outputs / c.tp)
    summed = np.where(kind == "row", inputs / c.tp, inputs)
    flat = kernels.gemm(device, job.precision, n, columns, summed)
    if not np.any(c.grid):
        return flat
    q = np.maximum(c.grid, 1)
    square = q * kernels.gemm(device, job.precision, n / (q * c.depth), outputs / q, inputs / q)
    return np.where(c.grid > 0, square, flat)


def _matrices(job: Job, c: Candidates) -> tuple[Floats, Floats, Floats]:
    """Forward, backward, and the weight-gradient part of backward, of the block's weight products."""
    n, device = tokens(job, c), job.machine.device
    forward: Floats = np.zeros(1)
    inputs_gradient: Floats = np.zeros(1)
    weights: Floats = np.zeros(1)
    for name, (outputs, inputs) in block_matrices(job.shape).items():
        kind = "row" if name in ("attn.proj", "mlp.proj", "mlp.down") else "col"
        forward = forward + _product(job, c, outputs, inputs, kind)
        columns = np.where(kind == "row", outputs, outputs / c.tp)
        summed = np.where(kind == "row", inputs / c.tp, inputs)
        flat = kernels.gemm(device, job.precision, n, summed, columns)
        flat_weights = kernels.gemm(device, job.precision, columns, summed, n)
        if np.any(c.grid):
            q = np.maximum(c.grid, 1)
            rows = n / (q * c.depth)
            square = q * kernels.gemm(device, job.precision, rows, inputs / q, outputs / q)
            square_weights = q * kernels.gemm(device, job.precision, outputs / q, inputs / q, rows)
            flat = np.where(c.grid > 0, square, flat)
            flat_weights = np.where(c.grid > 0, square_weights, flat_weights)
        inputs_gradient = inputs_gradient + flat
        weights = weights + flat_weights
    return forward, inputs_gradient + weights, weights


def _attention(job: Job, c: Candidates) -> tuple[Floats, Floats]:
    """QKᵀ, softmax and AV: fused, or the two batched products alone (`_elementwise` has the softmax)."""
    shape, device = job.shape, job.machine.device
    length = shape.sequence / c.cp
    if job.stack.flash:
        flops = 4 * c.micro_batch * length * shape.sequence * shape.width / c.tp / 2 / job.stack.attention_rate
        forward = kernels.flash(device, job.precision, flops, shape.sequence)
        backward = kernels.flash(device, job.precision, 2.5 * flops, shape.sequence)
        exposed, exposed_back = _ring(job, c, forward, backward)
        return forward + exposed, backward + exposed_back
    batch = c.micro_batch * shape.heads / c.tp
    head = shape.head_size
    score = kernels.gemm(device, job.precision, length, shape.sequence, head, batch)
    mix = kernels.gemm(device, job.precision, length, head, shape.sequence, batch)
    return score + mix, 2 * score + 2 * mix


def _ring(job: Job, c: Candidates, forward: Floats, backward: Floats) -> tuple[Floats, Floats]:
    """Seconds of context parallelism's ring that do not hide behind attention, forward and backward.

    `parallel/context.py`: n steps; keys and values travel on during all but the last. Backward their gradients, as wide
    as the residual stream, set out after every step but the first, and the last of them hide behind nothing.

    Args:
        job: what is priced.
        c: the layouts.
        forward: seconds of attention.
        backward: of its gradients.
    """
    elements = 2 * c.micro_batch * job.shape.sequence * job.shape.kv_width / c.tp
    hops = np.maximum(1, c.cp - 1)
    hop = collectives.all_gather(job.machine, elements * job.item, c.cp, c.tp) / hops
    back = collectives.all_gather(job.machine, elements * (job.stack.residual_bytes or job.item), c.cp, c.tp) / hops
    step = backward / c.cp

    def shows(travels: Floats) -> Floats:
        return np.maximum(0.0, travels - step)

    several = shows(hop) + np.maximum(0, c.cp - 3) * shows(hop + back) + shows(back)
    exposed_back = shows(hop) + np.where(c.cp > 2, several, 0.0) + back
    exposed = hops * np.maximum(0.0, hop - forward / c.cp)
    return np.where(c.cp > 1, exposed, 0.0), np.where(c.cp > 1, exposed_back, 0.0)


def _elementwise(job: Job, c: Candidates) -> tuple[Floats, Floats, tuple[Floats, Floats]]:
    """Element-wise work by bytes moved: forward, backward, and that on the scores (forward, backward).

    Counted in units of the residual stream, tensors read plus written; a dropout mask is half a 16-bit tensor.
    Outside tensor parallelism: 2 norms (read, write), 2 × dropout and residual. Inside: activation, q/k/v layout. Where
    attention is not fused, its batched products read q, k and v in place, and only the context is copied forward.
    """
    shape, device, stack = job.shape, job.machine.device, job.stack
    n, item = tokens(job, c), job.item
    mask = 0.5 if stack.dropout else 0.0
    split_all = (c.sequence_parallel > 0) | (c.grid > 0)
    outside = np.where(split_all, 1 / c.tp, 1.0)
    inner = shape.mlp_width / shape.width
    gates = 2 if shape.family == "llama" else 1
    copies = 2 * (1 + 2 * shape.kv_width / shape.width) + 2
    loose = 0.0 if stack.fused else 1.0
    residual = 2 * (2 + 3 + mask) + loose * 2 * (2 + 2 + mask)
    inside = (gates + 1) * inner + (copies if stack.flash else 2) + loose * 2 * inner
    stream = n * shape.width * item
    forward = kernels.memory(device, stream * (outside * residual + inside / c.tp)) + (10 + 8 * loose) * device.launch
    residual_back = 2 * (4 + 2 + mask) + loose * 2 * (2 + mask)
    inside_back = (2 * gates + 1) * inner + copies + loose * 2 * inner
    backward = (
        kernels.memory(device, stream * (outside * residual_back + inside_back / c.tp))
        + (14 + 8 * loose) * device.launch
    )
    if stack.flash:
        nothing = np.zeros(1)
        return forward, backward, (nothing, nothing)
    scores = c.micro_batch * shape.heads / c.tp * shape.sequence**2 / c.cp * item
    keep = 2 + mask if stack.dropout else 0.0
    apart = _apart(job, c) if stack.fused else loose
    ahead = (
        kernels.memory(device, scores * (2 + keep + apart * 6))
        + (2 + SOFTMAX_OPERATIONS * (apart - loose)) * device.launch
    )
    back = (
        kernels.memory(device, scores * (3 + keep + apart * 4))
        + (2 + SOFTMAX_OPERATIONS * (apart - loose)) * device.launch
    )
    return forward, backward, (ahead, back)


def _tensor(job: Job, c: Candidates) -> tuple[Floats, Floats]:
    """Tensor-parallel communication of one block that is not hidden."""
    machine, stack = job.machine, job.stack
    moved = tokens(job, c) * job.shape.width * job.item
    summed = collectives.all_reduce(machine, moved, c.tp, 1)
    gathered = collectives.all_gather(machine, moved, c.tp, 1)
    wait = 2 * machine.node.wait
    flat = np.where(c.sequence_parallel > 0, 4 * gathered, 2 * summed)
    forward, backward = flat + wait, flat * (1 - stack.tp_overlap) + wait
    if np.any(c.grid):
        ahead = _summa(job, c)
        forward = np.where(c.grid > 0, ahead, forward)
        backward = np.where(c.grid > 0, 2 * ahead, backward)
    one = c.tp == 1
    return np.where(one, 0.0, forward), np.where(one, 0.0, backward)


def _summa(job: Job, c: Candidates) -> Floats:
    """Panels that SUMMA broadcasts in one block's forward pass on a q×q grid (Tesseract: `depth` of them).

    Every product runs q steps; each broadcasts a panel of activations along the rows and one of weights along the
    columns. Backward does so twice, with a reduction in the place of one of the broadcasts. The two norms sum their
    statistics over a row.
    """
    q = np.maximum(c.grid, 1)
    n = tokens(job, c) / (q * c.depth)
    total: Floats = np.zeros(1)
    for outputs, inputs in block_matrices(job.shape).values():
        activations = n * inputs / q * job.item
        weights = outputs * inputs / q**2 * job.item
        total = total + q * collectives.broadcast(job.machine, activations, q, 1)
        total = total + q * collectives.broadcast(job.machine, weights, q, q)
    return total + 2 * collectives.all_reduce(job.machine, 8 * n, q, 1)
