"""Losses, logits and gradients of GPT and LLaMA under every scheme equal the unsharded model's in fp64."""

from unittest.mock import patch

import pytest
import torch
from ranks import spawn
from tensor_cases import SHAPES, assemble, batch, create, distance

from tozan import models
from tozan.comm import Mesh
from tozan.errors import UserError
from tozan.layout import Layout
from tozan.models.generate import generate
from tozan.models.layers import initial
from tozan.parallel import apply as door
from tozan.parallel import recompute, vocabulary
from tozan.parallel.placement import Placement

LAYOUTS = {
    "1d, 1": (Layout(), False),
    "1d, 2": (Layout(tp=2), False),
    "1d, 4": (Layout(tp=4), False),
    "1d, 2, sequence": (Layout(tp=2), True),
    "1d, 4, sequence": (Layout(tp=4), True),
    "2d, 2 × 2": (Layout(tp=4, scheme="2d"), False),
    "2.5d, 1 × 1 × 2": (Layout(tp=2, scheme="2.5d", tp_depth=2), False),
    "2.5d, 2 × 2 × 2": (Layout(tp=8, scheme="2.5d", tp_depth=2), False),
}
BOUND = 1e-10


def splits(shape, layout):
    return shape.kv_heads % layout.sizes["tp_col"] == 0 and shape.heads % layout.sizes["tp_col"] == 0


@patch.object(vocabulary, "CHUNK_ELEMENTS", 400)  # several chunks, of a size that does not divide
def compare(layout, sequence, names, mode):
    """The worst relative difference of loss, held-out loss, logits and gradients, by model."""
    mesh = Mesh.create(layout, timeout_s=30)
    worst = {}
    for name in names:
        shape = SHAPES[name]
        tokens, targets = batch(shape)
        whole, model = create(shape), create(shape)
        placements = door.apply(model, mesh, sequence=sequence)
        recompute.apply(model, mode)
        assert list(dict(model.named_parameters())) == list(dict(whole.named_parameters()))
        loss, expected = model(tokens, targets), whole(tokens, targets)
        (3.0 * loss).backward()
        (3.0 * expected).backward()
        door.synchronize(dict(model.named_parameters()), placements, mesh)
        found = {"loss": distance(loss, expected)}
        with torch.no_grad():
            found["held out"] = distance(model(tokens, targets), expected)
            found["logits"] = distance(model(tokens), whole(tokens))
        for parameter, reference in whole.named_parameters():
            piece = model.get_parameter(parameter)
            assert piece.shape == placements[parameter].local_shape
            found[parameter] = distance(assemble(piece.grad, placements[parameter], mesh), reference.grad)
            found[f"value of {parameter}"] = distance(assemble(piece, placements[parameter], mesh), reference)
        worst[name] = max((value, key) for key, value in found.items())
    return worst


@pytest.mark.parametrize(
    ("layout", "mode"),
    [
        *((layout, "none") for layout in LAYOUTS),
        ("1d, 2, sequence", "selective"),
        ("1d, 2, sequence", "full"),
        ("2d, 2 × 2", "selective"),
        ("2.5d, 1 × 1 × 2", "full"),
    ],
)
def test_losses_and_gradients_equal_the_whole_model(layout, mode):
    how, sequence = LAYOUTS[layout]
    names = [name for name, shape in SHAPES.items() if splits(shape, how)]
    for worst in spawn(how.tp, compare, how, sequence, names, mode):
        assert all(difference < BOUND for difference, _ in worst.values()), worst


def logits_backward(layout):
    """The gradient through gathered logits, as for a loss of the user's own."""
    mesh = Mesh.create(layout, timeout_s=30)
    shape = SHAPES["llama"]
    tokens, _ = batch(shape)
    whole, model = create(shape), create(shape)
    placements = door.apply(model, mesh)
    for network in (whole, model):
        network(tokens).square().sum().backward()
    door.synchronize(dict(model.named_parameters()), placements, mesh)
    return max(
        distance(assemble(model.get_parameter(name).grad, placements[name], mesh), reference.grad)
        for name, reference in whole.named_parameters()
    )


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(tp=4, scheme="2d")])
def test_gradients_through_gathered_logits(layout):
    assert max(spawn(layout.tp, logits_backward, layout)) < BOUND


def on_meta(layout):
    """A model built on the meta device and filled piece by piece, against `models.create`."""
    mesh = Mesh.create(layout, timeout_s=30)
    shape = SHAPES["llama tied"]
    with torch.device("meta"):
        model = models.Llama(shape)
    placements = door.apply(model, mesh)
    assert all(parameter.is_meta for parameter in model.parameters())
    door.fill(model, placements, lambda name, size: initial(shape, name, size, 1))
    whole = models.create(shape, 1)
    tokens, targets = batch(shape)
    with torch.no_grad():
        near = distance(model(tokens, targets), whole(tokens, targets)) < 1e-6
    return near and all(
        torch.equal(assemble(model.get_parameter(name).detach(), placements[name], mesh), reference)
        for name, reference in whole.named_parameters()
    )


def test_a_model_on_the_meta_device_gets_the_same_initial_values():
    assert all(spawn(4, on_meta, Layout(tp=4, scheme="2d")))


def in_bf16(layout, sequence):
    mesh = Mesh.create(layout, timeout_s=30)
    shape = SHAPES["gpt2"]
    tokens, targets = batch(shape)
    losses = []
    for model in (create(shape, torch.float32), create(shape, torch.float32)):
        if losses:
            door.apply(model, mesh, sequence=sequence)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(tokens, targets)
        loss.backward()
        assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())
        losses.append(loss)
    return losses[1].dtype == torch.float32, distance(losses[1], losses[0])


@pytest.mark.parametrize("layout", ["1d, 2", "1d, 2, sequence", "2d, 2 × 2"])
def test_autocast(layout):
    """bf16 rounds to 2⁻⁹; a mean over 61 tokens is far closer than one of them."""
    how, sequence = LAYOUTS[layout]
    assert all(right and near < 2**-9 for right, near in spawn(how.tp, in_bf16, how, sequence))


def generated(layout, name):
    """Tokens that a sharded and a whole model generate greedily, with caches."""
    mesh = Mesh.create(layout, timeout_s=30)
    shape = SHAPES[name]
    whole, model = create(shape), create(shape)
    door.apply(model, mesh)
    prompt = batch(shape, 2)[0][:, :3]
    with torch.inference_mode():
        return [torch.stack(list(generate(m, prompt, 4)), 1).tolist() for m in (model, whole)]


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(tp=4, scheme="2d")])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_sharded_model_generates_the_same_tokens(layout, name):
    for found, expected in spawn(layout.tp, generated, layout, name):
        assert found == expected


def bad_target():
    mesh = Mesh.create(Layout(tp=2), timeout_s=30)
    model = create(SHAPES["gpt2"])
    door.apply(model, mesh)
    tokens, targets = batch(SHAPES["gpt2"])
    targets[2, 2] = SHAPES["gpt2"].vocabulary
    with pytest.raises(RuntimeError, match="outside the vocabulary of 24"):
        model(tokens, targets)


def test_a_target_outside_the_vocabulary_is_no_silent_loss():
    spawn(2, bad_target)


def test_a_placement_takes_and_puts_back():
    placement = Placement((6, 4), ((range(0, 1), range(4, 6)), (range(2, 4),)))
    whole = torch.arange(24.0).view(6, 4)
    piece = placement.take(whole)
    assert piece.tolist() == [[2.0, 3.0], [18.0, 19.0], [22.0, 23.0]]
    target = torch.zeros(6, 4)
    placement.put(piece, target)
    assert torch.equal(placement.take(target), piece)
    assert target.sum() == piece.sum()
    with pytest.raises(ValueError, match=r"\(4, 6\).*\(6, 4\)"):
        placement.take(whole.T)
    with pytest.raises(ValueError, match="piece"):
        placement.put(whole, target)


def odd_batches(layout, sequence, tokens):
    mesh = Mesh.create(layout, timeout_s=30)
    model = create(SHAPES["gpt2"])
    door.apply(model, mesh, sequence=sequence)
    with pytest.raises(UserError) as error:
        model(tokens)
    return str(error.value)


@pytest.mark.parametrize(
    ("layout", "sequence", "size", "expected"),
    [
        (Layout(tp=2), True, (2, 5), "5 tokens over 2 ranks leaves 1 over"),
        (Layout(tp=2, scheme="2.5d", tp_depth=2), False, (3, 8), "3 samples over 2 rows (depth × side) leaves 1 over"),
    ],
)
def test_batches_that_do_not_split_are_refused(layout, sequence, size, expected):
    tokens = torch.zeros(size, dtype=torch.int64)
    assert all(expected in text for text in spawn(layout.tp, odd_batches, layout, sequence, tokens))
