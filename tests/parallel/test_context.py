"""Ring attention against PyTorch's own on whole sequences, in fp64, and the bytes that go round."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import spawn
from tensor_cases import SHAPES, batch, create, distance

from tozan.comm import Axis, Mesh, functions
from tozan.layout import Layout
from tozan.ops.attention import causal_attention_reference
from tozan.parallel import context


def ring(ranks, samples, kv_heads, group, half, size, dtype):
    """Relative differences of output and gradients of this rank's tokens, and the bytes that it sent."""
    mesh = Mesh.create(Layout(cp=ranks), timeout_s=30)
    axis = mesh["cp"]
    generator = torch.Generator().manual_seed(7)
    shapes = [(samples, heads, 2 * half * ranks, size) for heads in (group * kv_heads, kv_heads, kv_heads)]
    whole = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    dy = torch.randn(shapes[0], generator=generator, dtype=torch.float64)
    expected = causal_attention_reference(*whole)
    expected.backward(dy)
    own = context.own_tokens(shapes[0][2], axis)
    mine = [x.detach()[:, :, own].to(dtype).requires_grad_() for x in whole]
    out = context.ring_attention(*mine, axis=axis)
    forward = mesh.ledger.sum().bytes
    out.backward(dy[:, :, own].to(dtype))
    pairs = [(out, expected), *((x.grad, y.grad) for x, y in zip(mine, whole, strict=True))]
    found = [distance(got.double(), wanted[:, :, own]) for got, wanted in pairs]
    return max(found), forward, mesh.ledger.sum().bytes - forward


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    ranks=st.integers(2, 4),
    samples=st.integers(1, 2),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    half=st.integers(1, 40),
    size=st.sampled_from([2, 8, 20]),
)
def test_ring_attention_is_attention(ranks, samples, kv_heads, group, half, size):
    elements = 2 * samples * kv_heads * size * 2 * half * (ranks - 1)
    for worst, forward, backward in spawn(ranks, ring, ranks, samples, kv_heads, group, half, size, torch.float64):
        assert worst < 1e-13
        assert (forward, backward) == (8 * elements, 16 * elements)


def test_in_bf16_gradients_travel_in_fp32():
    elements = 2 * 2 * 2 * 16 * 2 * 32 * 2
    for worst, forward, backward in spawn(3, ring, 3, 2, 2, 2, 32, 16, torch.bfloat16):
        assert worst < 0.02
        assert (forward, backward) == (2 * elements, 6 * elements)


def whole_model(name, layout, sequence):
    """Worst relative difference of the loss and all gradients from the model on whole sequences, in fp64."""
    from tozan.parallel import apply as door

    mesh, shape = Mesh.create(layout, timeout_s=30), SHAPES[name]
    tokens, targets = batch(shape)
    model = create(shape)
    loss = model(tokens, targets)
    loss.backward()
    part = create(shape)
    placements = door.apply(part, mesh, sequence=sequence)
    context.apply(part, mesh["cp"], shape.sequence)
    own = context.own_tokens(shape.sequence, mesh["cp"])
    mine = part(tokens[:, own], targets[:, own])
    mine.backward()
    named = dict(part.named_parameters())
    door.synchronize(named, placements, mesh)
    found = [distance(functions.reduce_from(mine.detach(), mesh["cp"]), loss)]
    for parameter, placement in placements.items():
        total = functions.reduce_from(named[parameter].grad, mesh["cp"])
        found.append(distance(total, placement.take(model.get_parameter(parameter).grad)))
    return max(found)


@pytest.mark.parametrize(
    ("name", "layout", "sequence"),
    [
        ("gpt2", Layout(cp=2), False),
        ("llama", Layout(cp=4), False),
        ("gpt2", Layout(cp=2, tp=2), True),
        ("llama", Layout(cp=2, tp=2), False),
    ],
)
def test_models_on_shared_sequences(name, layout, sequence):
    assert max(spawn(layout.world_size, whole_model, name, layout, sequence)) < 1e-12


def test_other_numbers_of_tokens_are_refused():
    q, k = torch.zeros(1, 2, 6, 4), torch.zeros(1, 2, 8, 4)
    alone = Axis.single("cp")
    for arguments, options in (((q, k, k), {}), ((q[:, :, :5],) * 3, {}), ((q, q, q), {"tokens": 8})):
        with pytest.raises(ValueError, match="where a rank has"):
            context.ring_attention(*arguments, axis=alone, **options)
