"""Bytes that the fullest rank holds, by category, for thousands of layouts at once; and by block for one.

Activations are counted tensor by tensor: what autograd keeps for the backward pass. For the stack without flash
attention the count is that of Korthikanti et al. (arXiv 2205.05198, equations 1 to 5).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tozan.layout import count, shard, split_layers
from tozan.models.arithmetic import block_matrices
from tozan.planner import costs, layer
from tozan.planner.candidates import Candidates, Flags, Floats
from tozan.planner.kept import Kept, kept
from tozan.planner.layer import Job


@dataclass(frozen=True)
class Memory:
    """Bytes per category on the fullest rank, and on the host; one entry per candidate.

    The category `working` is what lives only for a moment: the block being recomputed, logits, gathered parameters.
    """

    parts: dict[str, Floats]
    host: Floats
    nvme: Floats

    @property
    def total(self) -> Floats:
        """Bytes on the device."""
        return sum(self.parts.values(), np.zeros(1))

    def fits(self, job: Job) -> Flags:
        """Whether device, host and NVMe hold their parts."""
        device, host = job.machine.device, job.machine.host
        return (self.total <= device.memory) & (self.host <= host.memory) & (self.nvme <= host.nvme)


def memory(job: Job, c: Candidates) -> Memory:
    """Price the fuller of the first stage (most micro-batches in flight) and the last (the logits)."""
    blocks, ends = costs.stage_parameters(job, c)
    state = state_bytes(job, c, blocks + ends)
    inside = block_activations(job, c)
    kept = kept_activations(job, c) * costs.layers_of(job.shape, c)
    again = np.where(c.recompute > 0, inside, 0.0)
    logits = layer.tokens(job, c) * np.ceil(job.shape.vocabulary / c.tp) * (job.stack.logits_bytes / 4)
    first, last = in_flight(job, c)
    logits_first = np.where(c.pp == 1, logits, 0.0)
    heavy_end = kept * last + np.maximum(again, logits) > kept * first + np.maximum(again, logits_first)
    activations = kept * np.where(heavy_end, last, first)
    gathered = np.where(c.zero == 3, 2 * blocks / costs.layers_of(job.shape, c) * 4.0, 0.0)
    working = np.maximum(again, np.where(heavy_end, logits, logits_first)) + gathered
    device = job.machine.device
    reserve = np.broadcast_to(np.where(c.recompute > 0, device.recompute_reserve, 0.0) + device.reserve, working.shape)
    away = c.offload > 0
    parts = {
        "parameters": state["parameters"],
        "gradients": state["gradients"],
        "optimizer": np.where(away, 0.0, state["optimizer"]),
        "activations": activations,
        "working": working,
        "reserve": reserve,
    }
    host = np.where(c.offload == 1, state["optimizer"] + state["gradients"], 0.0)
    nvme = np.where(c.offload == 2, state["optimizer"], 0.0)
    return Memory(parts, host, nvme)


def state_bytes(job: Job, c: Candidates, elements: Floats) -> dict[str, Floats]:
    """Parameters, gradients and optimizer state of `elements` parameters on one rank, by ZeRO stage.

    The vectorised form of `tozan.layout.zero_bytes`; a test holds them equal.
    """
    stack = job.stack
    whole = np.ceil(elements)
    share = np.ceil(whole / (c.dp * c.cp))
    return {
        "parameters": stack.parameter_bytes * np.where(c.zero >= 3, share, whole),
        "gradients": stack.gradient_bytes * np.where(c.zero >= 2, share, whole),
        "optimizer": stack.optimizer_bytes * np.where(c.zero >= 1, share, whole),
    }


def block_activations(job: Job, c: Candidates) -> Floats:
    """Bytes that one block keeps for its backward pass of one micro-batch if nothing is recomputed."""
    if job.stack.selective == "mlp":
        return _own(job, c).none
    outside, inside, scores = _tensors(job, c)
    return outside + inside + scores


def kept_activations(job: Job, c: Candidates) -> Floats:
    """Bytes that one block keeps under the candidate's recomputation."""
    if job.stack.selective == "mlp":
        own = _own(job, c)
        choices = own.none, own.selective, own.full
    else:
        outside, inside, scores = _tensors(job, c)
        entry = layer.tokens(job, c) * job.shape.width * (job.stack.residual_bytes or job.item)
        choices = outside + inside + scores, outside + inside, entry / np.where(c.grid > 0, c.tp, 1)
    size = np.broadcast(*choices, c.recompute).shape
    return np.choose(c.recompute, [np.broadcast_to(x, size) for x in choices])


def _own(job: Job, c: Candidates) -> Kept:
    """What the trainer of this project keeps."""
    word = int(job.stack.residual_bytes or job.item)
    tokens, shared = layer.tokens(job, c), c.sequence_parallel
    return kept(job.shape, tokens, job.item, word, tp=c.tp, grid=c.grid, sequence_parallel=shared)


def _tensors(job: Job, c: Candidates) -> tuple[Floats, Floats, Floats]:
    """Kept bytes of one block of other trainers: outside tensor parallelism, inside it, and of the scores.

    Outside: inputs of two norms, inputs of the two products after them, two dropout masks of one byte. Inside: q, k, v,
    the context, and the MLP's inner tensors (2 for GELU; 3 for SwiGLU, 4 if its two steps
    are not fused). Scores: softmax, its mask, its dropout.
    """
    shape, stack, item = job.shape, job.stack, job.item
    stream = layer.tokens(job, c) * shape.width
    split = np.where((c.sequence_parallel > 0) | (c.grid > 0), c.tp, 1)
    outside = stream * (2 * (stack.residual_bytes or item) + 2 * item + (2 if stack.dropout else 0)) / split
    tensors = (3 if stack.fused else 4) if shape.family == "llama" else 2
    inner = stream * item * tensors * shape.mlp_width / shape.width / c.tp
    inside = stream * item * (2 + 2 * shape.kv_width / shape.width) / c.tp + inner
    if stack.flash:
        return outside, inside, 4.0 * layer.tokens(job, c) * shape.heads / c.tp
    pairs = c.micro_batch * shape.heads * shape.sequence * shape.sequence / c.cp / c.tp
    return outside, inside, pairs * (2 * item + 1 if stack.dropout else item)


def in_flight(job: Job, c: Candidates) -> tuple[Floats, Floats]:
    """Micro-batches, in units of whole stages, whose activations the first and the last stage hold at their peaks.

    1F1B: the number of stages, and 1; ZB-H1: that number on both; interleaved: (p v + p − 1) / v, and
    ((v − 1) p + 1) / v. Tests hold all to `schedules`.
    """
    microbatches = job.global_batch / (c.dp * c.micro_batch)
    woven = c.chunks > 1
    first = np.where(woven, (c.pp * c.chunks + c.pp - 1) / c.chunks, c.pp)
    last = np.where(woven, ((c.chunks - 1) * c.pp + 1) / c.chunks, np.where(c.zero_bubble > 0, c.pp, 1))
    return np.minimum(first, microbatches), np.minimum(last, microbatches)


def by_block(job: Job, c: Candidates, index: int) -> list[dict[str, float]]:
    """Bytes of every block on the rank of the first tensor-parallel coordinate, from the shards the trainer would cut.

    Returns:
        One dict per block: `block`, `stage`, `parameters` (elements), `state` (bytes), `activations` (bytes, all
        micro-batches in flight).
    """
    one, mesh, shape = c.pick([index]), c.layout(index), job.shape
    heads = (shape.heads, shape.kv_heads)
    elements = 0
    for name, size in block_matrices(shape).items():
        role = {"attn.qkv": "qkv", "attn.proj": "row", "mlp.proj": "row", "mlp.down": "row"}.get(name, "col")
        place = mesh.coordinates(0)
        elements += count(shard(role, size, mesh, place, heads))  # type: ignore[arg-type]
        if shape.family == "gpt2":
            elements += count(shard(role, size[:1], mesh, place, heads))  # type: ignore[arg-type]
    norms = 2 * (2 if shape.family == "gpt2" else 1)
    elements += norms * count(shard("norm", (shape.width,), mesh, mesh.coordinates(0)))
    state = float(sum(x.item() for x in state_bytes(job, one, np.array([float(elements)])).values()))
    kept = float(kept_activations(job, one)[0])
    deepest = float(in_flight(job, one)[0][0])
    pp, chunks = mesh.pp, int(one.chunks[0])
    rows = []
    for stage, pieces in enumerate(split_layers(shape.layers, pp, chunks)):
        held = max(1.0, deepest - (stage if chunks == 1 else 2 * stage / chunks))
        held = min(held, deepest)
        for block in (number for piece in pieces for number in piece):
            row = {"block": block, "stage": stage, "parameters": elements, "state": state, "activations": kept * held}
            rows.append({key: float(value) for key, value in row.items()})
    return sorted(rows, key=lambda row: row["block"])
