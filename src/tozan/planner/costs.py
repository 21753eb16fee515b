"""Seconds of one optimizer step, for thousands of layouts at once.

The pipeline is priced by closed forms, which tests hold to `schedules.replay`; everything else is a sum of what
`layer`, `kernels` and `collectives` price, less what hides behind something else.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tozan.models.arithmetic import Shape, block_matrices
from tozan.planner import collectives, kernels, layer
from tozan.planner.candidates import Candidates, Floats
from tozan.planner.layer import KINDS, Job

PARTS = (*KINDS, "host", "ends", "bubble", "pipeline", "data", "optimizer", "noise")
"""What a step's time is made of: four kinds of block work, waiting for the host, embedding and loss, pipeline bubble,
pipeline messages, data-parallel communication that shows, optimizer, waiting for late ranks."""

CONTENTION = 0.1
"""Share of hidden communication by which the computation that hides it gets slower (they share memory bandwidth)."""


@dataclass(frozen=True)
class Cost:
    """Seconds of a step and of its parts, one entry per candidate."""

    seconds: Floats
    parts: dict[str, Floats]


@dataclass(frozen=True)
class Stage:
    """Seconds of one micro-batch on the fullest middle stage, and of the ends that only some stages have."""

    forward: Floats
    backward: Floats
    weights: Floats
    head: Floats
    embedding: Floats
    kinds: dict[str, Floats]
    host: Floats


def step(job: Job, c: Candidates) -> Cost:
    """Price one step of every candidate."""
    stage = stages(job, c)
    microbatches = job.global_batch / (c.dp * c.micro_batch)
    send = message(job, c) * (1 - job.stack.pp_overlap)
    passes = stage.forward + stage.backward + 2 * send * c.chunks
    last = _last(job, c, stage) + 2 * send * c.chunks + stage.head + np.where(c.pp == 1, stage.embedding, 0.0)
    if job.stack.by_cost:
        passes = _by_cost(job, c, stage)[0] + 2 * send
    slowest = np.maximum(passes, last)
    whole = c.pp * 2 * send * c.chunks + stage.head + stage.embedding
    whole = whole + _blocks(stage) * job.shape.layers / layers_of(job.shape, c)
    fill = (whole - slowest) / c.chunks
    late = np.clip(2 * stage.weights, 0, stage.forward + stage.backward) * (c.pp - 1)
    fill = np.where(c.zero_bubble > 0, np.maximum(0.0, fill - late), fill)
    fill = np.where(c.pp > 1, fill, 0.0)
    data = _data(job, c, stage, microbatches)
    optimizer = _optimizer(job, c)
    noise = _noise(job, c, slowest, microbatches)
    parts = {kind: microbatches * seconds for kind, seconds in stage.kinds.items()}
    parts["host"] = microbatches * stage.host
    parts["pipeline"] = np.where(c.pp > 1, microbatches * 2 * send * c.chunks, 0.0)
    parts["bubble"] = fill
    parts["data"], parts["optimizer"], parts["noise"] = data, optimizer, noise
    seconds = microbatches * np.where(c.pp > 1, slowest, whole) + fill + data + optimizer + noise
    parts["ends"] = seconds - sum(parts.values())
    return Cost(seconds, {name: np.broadcast_to(parts[name], seconds.shape) for name in PARTS})


def _last(job: Job, c: Candidates, stage: Stage) -> Floats:
    """Seconds of the blocks of the last stage: of one block less where layers do not divide evenly."""
    if job.stack.by_cost:
        return _by_cost(job, c, stage)[1]
    uneven = job.shape.layers % (c.pp * c.chunks) != 0
    shorter = np.where(uneven, _blocks(stage) / layers_of(job.shape, c) * c.chunks, 0.0)
    return _blocks(stage) - shorter


def _by_cost(job: Job, c: Candidates, stage: Stage) -> tuple[Floats, Floats]:
    """Seconds of the blocks of the first and the last stage if a stage is full once its share of the cost is passed."""
    shape = job.shape
    head = shape.vocabulary * shape.width / sum(rows * columns for rows, columns in block_matrices(shape).values())
    total, layers = shape.layers + head, float(shape.layers)
    first = np.where(c.pp > 1, np.minimum(layers, np.floor(total / c.pp) + 1), layers)
    before = np.where(c.pp > 1, np.minimum(layers, np.floor(total * (c.pp - 1) / c.pp) + 1), 0.0)
    one = _blocks(stage) / layers_of(shape, c)
    return first * one, (layers - before) * one


def stages(job: Job, c: Candidates) -> Stage:
    """Seconds of a micro-batch on one stage: its blocks, or the host that issues them if that takes longer."""
    one = layer.block(job, c)
    layers = layers_of(job.shape, c) * job.stack.slowdown
    forward = layers * sum(one.forward.values())
    backward = layers * (sum(one.backward.values()) + sum(one.again.values()))
    ahead, back = layer.operations(job, c)
    full = np.where(c.recompute == 2, ahead, 0.0)
    host = job.machine.device.host
    gathers = 2 * (layer.COLLECTIVE * (c.tp > 1) * host + job.machine.node.jitter * np.log2(c.tp))
    again = np.where(c.recompute == 2, gathers, 0)
    issue, issue_back = layers * (ahead * host + gathers), layers * ((back + full) * host + gathers + again)
    ahead, back = _together(forward, issue), _together(backward, issue_back)
    waits = ahead - forward + back - backward
    head, embedding = _ends(job, c)
    kinds = {kind: layers * (one.forward[kind] + one.backward[kind] + one.again[kind]) for kind in KINDS}
    return Stage(ahead, back, layers * one.weights, head, embedding, kinds, waits)


def _together(device: Floats, host: Floats) -> Floats:
    """Seconds of a pass of which device and host each take their time: the longer, a quarter more if they are equal.

    Neither works evenly: the device waits for the host through small operations, and the host gets ahead only during
    large ones. Cubes are fitted to calibration rows: without bound, the shorter would hide behind the longer.
    """
    return np.cbrt(device * device * device + host * host * host)


def stage_parameters(job: Job, c: Candidates) -> tuple[Floats, Floats]:
    """Parameters of the fullest stage on one rank: those of its blocks, and those of embedding and head."""
    shape = job.shape
    split = np.where(c.grid > 0, np.maximum(c.grid, 1) ** 2, c.tp)
    matrices = sum(rows * columns for rows, columns in block_matrices(shape).values())
    vectors, whole = _vectors(shape)
    side = np.where(c.grid > 0, np.maximum(c.grid, 1), c.tp)
    loose = np.where(c.grid > 0, whole / np.maximum(c.grid, 1), whole)
    blocks = layers_of(shape, c) * (matrices / split + vectors / side + loose)
    table = np.ceil(shape.vocabulary / c.tp) * shape.width
    positions = shape.sequence * shape.width if shape.family == "gpt2" else 0
    both = table + positions + np.where((c.pp == 1) & (not shape.tied), table, 0.0)
    return blocks, both


def _vectors(shape: Shape) -> tuple[int, int]:
    """Elements of one block's vectors: those that 1D tensor parallelism splits, and those it does not."""
    if shape.family == "llama":
        return 0, 2 * shape.width
    matrices = block_matrices(shape)
    return matrices["attn.qkv"][0] + matrices["mlp.fc"][0], 2 * shape.width + 4 * shape.width


def layers_of(shape: Shape, c: Candidates) -> Floats:
    """Blocks of the fullest stage."""
    return np.ceil(shape.layers / (c.pp * c.chunks)) * c.chunks


def _blocks(stage: Stage) -> Floats:
    """Seconds of all blocks of the fullest stage, both ways."""
    return stage.forward + stage.backward


def _ends(job: Job, c: Candidates) -> tuple[Floats, Floats]:
    """Seconds of output head and loss (last stage), and of the embedding (first), both ways, for one micro-batch."""
    shape, device, n = job.shape, job.machine.device, layer.tokens(job, c)
    columns = np.ceil(shape.vocabulary / c.tp)
    products = (
        kernels.gemm(device, job.precision, n, columns, shape.width)
        + kernels.gemm(device, job.precision, n, shape.width, columns)
        + kernels.gemm(device, job.precision, columns, shape.width, n)
    ) * np.where(columns % 2, device.gemm.odd, 1.0)
    head = products + kernels.memory(device, n * columns * job.stack.logits_bytes)
    stream = n * shape.width * job.item
    joined = collectives.all_reduce(job.machine, stream, c.tp, 1)
    table = 2 * columns * shape.width * job.item
    embedding = kernels.memory(device, 6 * stream + table) + joined
    return (head + joined + 12 * device.launch) * job.stack.slowdown, embedding


def message(job: Job, c: Candidates) -> Floats:
    """Seconds of one message between neighbouring stages."""
    cut = (c.sequence_parallel > 0) | (c.grid > 0) | job.stack.scatter_gather
    moved = layer.tokens(job, c) * job.shape.width * job.item / np.where(cut, c.tp, 1)
    seconds = collectives.send(job.machine, moved, c.dp * c.cp * c.tp)
    if job.stack.scatter_gather:
        whole = moved * np.where(c.sequence_parallel > 0, 0, c.tp)
        seconds = seconds + collectives.all_gather(job.machine, whole, c.tp, 1)
    return np.where(c.pp > 1, seconds, 0.0)


def _data(job: Job, c: Candidates, stage: Stage, microbatches: Floats) -> Floats:
    """Communication over the replicas that does not hide behind the backward pass.

    ZeRO 0: one all-reduce a step. 1: reduce-scatter and all-gather. 2: the reduce-scatter after every micro-batch,
    since whole gradients are not kept. 3: also every parameter gathered before its forward and again before its
    backward.
    """
    machine, stack = job.machine, job.stack
    blocks, ends = stage_parameters(job, c)
    elements = blocks + ends
    ranks = c.dp * c.cp * np.where(c.grid > 0, c.depth, 1)
    stride = np.where(c.grid > 0, np.maximum(c.grid, 1) ** 2, c.tp)
    summed = collectives.all_reduce(machine, elements * stack.wire_bytes, ranks, stride)
    pieces = np.where(c.zero == 3, layers_of(job.shape, c) + 1, 1)
    width = 2.0 if job.precision != "fp32" else 4.0
    scattered = pieces * collectives.all_gather(machine, elements / pieces * stack.wire_bytes, ranks, stride)
    gathered = pieces * collectives.all_gather(machine, elements / pieces * width, ranks, stride)
    scattered, gathered = scattered / stack.zero_rate, gathered / stack.zero_rate
    backward = stage.backward + stage.head
    once = _hide(np.where(c.zero == 0, summed, scattered), stack.dp_overlap * backward)
    once = once + np.where(c.zero >= 1, _hide(gathered, stack.gather_overlap * stage.forward), 0.0)
    often = microbatches * _hide(scattered, stack.dp_overlap * backward) + np.where(c.zero == 2, gathered, 0.0)
    always = microbatches * (
        _hide(gathered, stack.dp_overlap * stage.forward) + _hide(scattered + gathered, stack.dp_overlap * backward)
    )
    seconds = np.where(c.zero == 3, always, np.where(c.zero == 2, often, once))
    # A tied table lives on the first and the last stage, which add their gradients up: over the network, unless all
    # stages share a node.
    table = np.ceil(job.shape.vocabulary / c.tp) * job.shape.width * stack.wire_bytes
    apart = np.where(c.ranks > machine.node.devices, machine.node.devices, 1)
    tied = collectives.all_reduce(machine, table, 2, apart) if job.shape.tied else 0.0
    return np.where(ranks > 1, seconds, 0.0) + np.where(c.pp > 1, tied, 0.0)


def _hide(seconds: Floats, behind: Floats) -> Floats:
    """What is left of communication of which up to `behind` seconds run beside computation, contention included."""
    hidden = np.minimum(seconds, behind)
    return seconds - hidden + CONTENTION * hidden


def _optimizer(job: Job, c: Candidates) -> Floats:
    """Seconds of clipping and AdamW, by bytes: state read and written, gradients read twice, weights written."""
    stack, host = job.stack, job.machine.host
    blocks, ends = stage_parameters(job, c)
    share = np.where(c.zero >= 1, c.dp * c.cp, 1)
    elements = (blocks + ends) / share
    traffic = 2 * stack.optimizer_bytes + 2 * stack.gradient_bytes + stack.parameter_bytes
    device = job.machine.device
    here = elements * traffic / (device.bandwidth * (device.stream_efficiency or device.bandwidth_efficiency))
    moved = elements * (stack.gradient_bytes + stack.parameter_bytes) / host.bandwidth
    ram = moved + elements * traffic / host.memory_bandwidth
    disk = moved + elements * 2 * stack.optimizer_bytes / host.nvme_bandwidth
    return np.choose(c.offload, [np.broadcast_to(x, np.broadcast(here, c.offload).shape) for x in (here, ram, disk)])


def _noise(job: Job, c: Candidates, work: Floats, microbatches: Floats) -> Floats:
    """Seconds spent waiting for ranks that were held up.

    Delays of mean length D come at a rate r per node and second. Over work of t seconds on N nodes at least one comes
    with probability 1 − exp(−r N t), and all wait for it. Where every micro-batch ends in a reduction, that happens
    for every micro-batch; otherwise delays of different ranks overlap until the end of the step, but a rank's own add
    up.
    """
    noise = job.machine.noise
    if not noise.rate:
        return np.zeros(1)
    nodes = c.ranks / job.machine.node.devices
    if job.stack.loss_sync:
        return microbatches * noise.delay * -np.expm1(-noise.rate * nodes * work)
    spread = noise.delay * -np.expm1(-noise.rate * nodes * work * microbatches)
    return np.maximum(spread, noise.delay * noise.rate * work * microbatches)
