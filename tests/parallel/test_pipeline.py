"""Pipelines against the single process: the same bits in fp32, for every schedule and split."""

import time
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from ranks import spawn
from tensor_cases import SHAPES, assemble, batch, create, distance
from training import whole

from tozan import schedules
from tozan.comm import Axis, Mesh
from tozan.layout import Layout, split_layers
from tozan.models.arithmetic import Shape
from tozan.parallel import apply as door
from tozan.parallel import pipeline, recompute, weight_gradients
from tozan.parallel.data import DataParallel
from tozan.parallel.zero import Zero

WIDTH = 16
LAYERS = 6
MODELS = {
    "gpt2": Shape("gpt2", LAYERS, WIDTH, 4, 4, 32, 24, 8),
    "llama": Shape("llama", LAYERS, WIDTH, 4, 2, 24, 24, 8, tied=False),
    "llama tied": Shape("llama", LAYERS, WIDTH, 4, 4, 24, 24, 8),
}
UNEVEN = ((range(0, 1),), (range(1, 6),))
CASES = [
    # model, stages, schedule, chunks, micro-batches, layers (None: split_layers), recompute of every stage
    ("gpt2", 1, "gpipe", 1, 3, None, ["none"]),
    ("llama", 1, "zero-bubble", 1, 3, None, ["none"]),
    ("gpt2", 2, "gpipe", 1, 4, None, ["none", "none"]),
    ("llama", 2, "1f1b", 1, 3, UNEVEN, ["full", "none"]),
    ("llama tied", 2, "1f1b", 1, 1, UNEVEN, ["none", "selective"]),
    ("gpt2", 2, "interleaved", 3, 4, None, ["none", "full"]),
    ("llama tied", 2, "zero-bubble", 1, 5, None, ["none", "none"]),
    ("gpt2", 2, "zero-bubble", 1, 4, UNEVEN, ["selective", "full"]),
    ("llama", 3, "interleaved", 2, 3, None, ["none"] * 3),
    ("gpt2", 3, "zero-bubble", 1, 6, None, ["none"] * 3),
    ("llama tied", 4, "1f1b", 1, 6, None, ["none"] * 4),
    ("llama", 4, "zero-bubble", 1, 8, None, ["none"] * 4),
]


def micro_batches(shape, count):
    """`count` micro-batches of 2 samples: their tokens and targets."""
    tokens, targets = batch(shape, 2 * count)
    return tokens.split(2), targets.split(2)


def in_bf16():
    return torch.autocast("cpu", dtype=torch.bfloat16)


def single(shape, inputs, targets, factor, dtype=torch.float32, autocast=nullcontext):
    """Losses and gradients of one process."""
    model = create(shape, dtype)
    losses = []
    for x, y in zip(inputs, targets, strict=True):
        with autocast():
            loss = model(x, y)
        (loss * factor).backward()
        losses.append(loss.detach())
    return torch.stack(losses), {name: p.grad for name, p in model.named_parameters()}


def stage_of(shape, mesh, schedule, layers, mode="none", dtype=torch.float32, autocast=nullcontext, **options):
    """This rank's model, its placements and its pipeline."""
    model = create(shape, dtype)
    part = pipeline.cut(model, layers, mesh["pp"].index)
    placements = door.apply(model, mesh, **options)
    recompute.apply(model, mode)
    local = door.create(mesh, **options).local_shape
    ready = pipeline.Pipeline(model, part, mesh["pp"], schedule, lambda b, t: local(b, t, shape.width), autocast)
    return model, ready.share(placements), ready


def same_bits(name, stages, schedule, chunks, count, layers, modes, autocast=nullcontext):
    """What differs from the single process by a bit, after two steps; and whether the timeline is the schedule's."""
    mesh, shape = Mesh.create(Layout(pp=stages), timeout_s=30), MODELS[name]
    stage = mesh["pp"].index
    layers = layers or split_layers(LAYERS, stages, chunks)
    plan = schedules.create(schedule, stages, count, chunks)
    inputs, targets = micro_batches(shape, count)
    factor = 1 / sum(int((y != -100).sum()) for y in targets)
    expected, gradients = single(shape, inputs, targets, factor, autocast=autocast)
    model, _, ready = stage_of(shape, mesh, plan, layers, modes[stage], autocast=autocast)
    for _ in range(2):
        model.zero_grad()
        outcome = ready.step(inputs, targets, factor)
    wrong = [n for n, p in model.named_parameters() if not torch.equal(p.grad, gradients[n])]
    if not torch.equal(outcome.losses, expected):
        wrong.append("losses")
    ready.model.zero_grad()
    if not torch.equal(ready.evaluate(inputs, targets), expected) or any(
        p.grad is not None for p in model.parameters()
    ):
        wrong.append("evaluation")
    if [step.action for step in outcome.steps] != list(plan.actions[stage]):
        wrong.append("actions")
    return wrong, set(dict(model.named_parameters()))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}, {case[1]} stages, {case[2]}, {case[4]}")
def test_losses_and_gradients_are_the_single_process_bits(case):
    found = spawn(case[1], same_bits, *case)
    assert [wrong for wrong, _ in found] == [[]] * case[1]
    kept = [names for _, names in found]
    shared = {"embed.weight"} if MODELS[case[0]].tied and case[1] > 1 else set()
    assert set.union(*kept) == set(dict(create(MODELS[case[0]]).named_parameters()))
    assert sum(map(len, kept)) == len(set.union(*kept)) + len(shared)


@pytest.mark.parametrize("case", [CASES[3], CASES[7]], ids=lambda case: f"{case[0]}, {case[2]}")
def test_the_bits_are_the_same_under_autocast_too(case):
    assert [wrong for wrong, _ in spawn(case[1], same_bits, *case, in_bf16)] == [[]] * case[1]


def with_tensor_parallelism(layout, name, schedule, sequence):
    """Worst relative difference of losses and gradients from the single process in fp64."""
    mesh, shape = Mesh.create(layout, timeout_s=30), SHAPES[name]
    plan = schedules.create(schedule, layout.pp, 3)
    tokens, targets = batch(shape, 12)
    inputs, targets = tokens.split(4), targets.split(4)
    expected, gradients = single(shape, inputs, targets, 0.5, torch.float64)
    layers = split_layers(shape.layers, layout.pp)
    model, placements, ready = stage_of(shape, mesh, plan, layers, dtype=torch.float64, sequence=sequence)
    outcome = ready.step(inputs, targets, 0.5)
    door.synchronize(dict(model.named_parameters()), placements, mesh)
    found = [distance(outcome.losses, expected)]
    for parameter, reference in gradients.items():
        # Stages that lack a parameter take part in the sum with nothing.
        piece = placements.get(parameter) or door.Placement.whole(reference.shape, "pp")
        gradient = model.get_parameter(parameter).grad if parameter in placements else torch.zeros_like(reference)
        if parameter not in placements and mesh["pp"].index == 0:
            piece = door.Placement.whole(reference.shape)
        found.append(distance(assemble(gradient, piece, mesh), reference))
    return max(found)


@pytest.mark.parametrize(
    ("layout", "name", "schedule", "sequence"),
    [
        (Layout(pp=2, tp=2), "gpt2", "1f1b", False),
        (Layout(pp=2, tp=2), "llama", "zero-bubble", True),
        (Layout(pp=2, tp=4, scheme="2d"), "gpt2", "zero-bubble", False),
        (Layout(pp=2, tp=2, scheme="2.5d", tp_depth=2), "llama", "gpipe", False),
    ],
)
def test_with_tensor_parallelism(layout, name, schedule, sequence):
    assert max(spawn(layout.world_size, with_tensor_parallelism, layout, name, schedule, sequence)) < 1e-10


def three_dimensions(layout, zero):
    """Data, pipeline and tensor parallelism together: worst relative difference from the single process in fp64."""
    mesh, shape = Mesh.create(layout, timeout_s=30), SHAPES["gpt2"]
    axis = mesh["dp"]
    tokens, targets = batch(shape, 16)
    inputs, targets = tokens.split(2), targets.split(2)
    expected, gradients = single(shape, inputs, targets, 0.5, torch.float64)
    mine = range(axis.index, len(inputs), axis.size)
    plan = schedules.create("1f1b", layout.pp, len(mine))
    layers = split_layers(shape.layers, layout.pp)
    model, placements, ready = stage_of(shape, mesh, plan, layers, dtype=torch.float64)
    named = dict(model.named_parameters())
    shapes = {name: p.shape for name, p in named.items()}
    replicas = Zero(model, axis, 1) if zero else DataParallel(named, axis)
    for _ in range(2):
        outcome = ready.step([inputs[m] for m in mine], [targets[m] for m in mine], 0.5)
        door.synchronize(named, placements, mesh)
        replicas.begin(last=True)
        replicas.finish()
        summed = whole(replicas, {name: p.grad for name, p in replicas.parameters.items()}, shapes, axis)
        model.zero_grad()
    found = [distance(outcome.losses, expected[axis.index :: axis.size])]
    for parameter in placements:
        found.append(distance(summed[parameter], placements[parameter].take(gradients[parameter])))
    return max(found)


@pytest.mark.parametrize(
    ("layout", "zero"),
    [
        (Layout(pp=2, dp=2, tp=2), False),
        (Layout(pp=2, dp=2, tp=2), True),
        (Layout(pp=2, dp=2, tp=2, scheme="2.5d", tp_depth=2), True),
    ],
)
def test_three_dimensions(layout, zero):
    assert max(spawn(layout.world_size, three_dimensions, layout, zero)) < 1e-10


def slow_blocks(schedule, count):
    """A pipeline of two stages that sleep: (idle, busy) of this stage, in units of its forward pass."""
    mesh, shape, unit = Mesh.create(Layout(pp=2), timeout_s=30), MODELS["llama"], 0.03
    plan = schedules.create(schedule, 2, count)
    model, _, ready = stage_of(shape, mesh, plan, split_layers(LAYERS, 2))
    splits = schedule == "zero-bubble"
    linears = sum(isinstance(module, torch.nn.Linear) for module in model.blocks.modules())

    class Sleep(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            time.sleep(unit)
            return x.view_as(x)

        @staticmethod
        def backward(ctx, gradient):
            time.sleep(unit if splits else 2 * unit)
            return gradient

    class SlowProducts(weight_gradients.LocalProducts):
        def weight_gradient(self, dy, x, dtype):
            time.sleep(unit / linears)
            return super().weight_gradient(dy, x, dtype)

    ready._gradients.linear = partial(ready._gradients.linear, products=SlowProducts())
    next(iter(model.blocks)).register_forward_hook(lambda module, arguments, y: Sleep.apply(y))
    inputs, targets = micro_batches(shape, count)
    outcomes = [ready.step(inputs, targets, 1.0) for _ in range(4)]
    # A busy machine makes any step longer, none shorter.
    return min(outcome.idle for outcome in outcomes) / unit, min(outcome.busy for outcome in outcomes) / unit


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zero-bubble"])
def test_idle_time_is_the_schedules_bubble(schedule):
    """Forward 1, backward 1 + 1: each of two stages idles for 3 units, with zero-bubble for 1, whatever the batch."""
    bubble = schedules.bubble(schedule, 2, 1, 1.0, 2.0, 1.0)
    assert bubble == (1.0 if schedule == "zero-bubble" else 3.0)
    for idle, busy in spawn(2, slow_blocks, schedule, 4):
        assert busy > 4 * 3
        assert idle == pytest.approx(bubble, abs=0.9)


def test_wrong_splits_and_sizes_are_refused():
    shape = MODELS["gpt2"]
    alone = Axis.single("pp")
    for layers in (((range(0, 5),),), ((range(0, 6),), (range(6, 6),)), ((range(1, 6),), (range(0, 1),))):
        with pytest.raises(ValueError, match="every piece needs blocks"):
            pipeline.cut(create(shape), layers, 0)
    model = create(shape)
    part = pipeline.cut(model, split_layers(LAYERS, 1), 0)
    with pytest.raises(ValueError, match="1 ranks, a schedule of 2 × 1"):
        pipeline.Pipeline(model, part, alone, schedules.create("1f1b", 2, 2), lambda b, t: (b, t, WIDTH))
    ready = pipeline.Pipeline(model, part, alone, schedules.create("1f1b", 1, 2), lambda b, t: (b, t, WIDTH))
    with pytest.raises(ValueError, match="1 micro-batches for a schedule of 2"):
        ready.step(*[[tokens] for tokens in batch(shape, 2)], 1.0)
