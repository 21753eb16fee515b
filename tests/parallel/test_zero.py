import gc

import pytest
import torch
from ranks import spawn
from torch import nn
from training import TABLE, alone, batches, engine, loss_of, own, shape, together, tokens, whole

from tozan import models
from tozan.comm import Axis, Mesh
from tozan.layout import Layout, zero_bytes
from tozan.optim.adamw import AdamW
from tozan.parallel.zero import Zero


def same_bits(a_shape, size, stage, shards, micro_batches, options):
    expected = alone(a_shape, micro_batches=micro_batches)
    result = together(a_shape, size, stage, shards, micro_batches=micro_batches, options=options)
    assert result[:2] == expected[:2]
    for mine, other in zip(result[2:4], expected[2:4], strict=True):
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[name], other[name]) for name in other)


@pytest.mark.parametrize(
    ("stage", "size", "shards", "family", "tied", "recompute"),
    [
        (1, 2, None, "gpt2", True, None),
        (1, 4, 2, "llama", False, None),
        (2, 3, None, "llama", True, "selective"),
        (2, 4, 2, "gpt2", True, None),
        (3, 1, None, "gpt2", True, None),
        (3, 2, None, "gpt2", False, "full"),
        (3, 2, None, "gpt2", True, "selective"),
        (3, 3, None, "llama", True, None),
        (3, 4, 2, "gpt2", True, "full"),
    ],
)
def test_losses_norms_weights_and_state_have_the_single_process_bits(stage, size, shards, family, tied, recompute):
    micro_batches = 6 if size == 3 else 4
    spawn(size, same_bits, shape(family, tied), size, stage, shards, micro_batches, {"recompute": recompute})


def close(stage, shards):
    expected = alone(shape(), dtype=torch.float64)
    result = together(shape(), 4, stage, shards, deterministic=False, options={"dtype": torch.float64})
    torch.testing.assert_close(result[0], expected[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(result[1], expected[1], rtol=1e-12, atol=0)


@pytest.mark.parametrize(("stage", "shards"), [(1, None), (2, 2), (3, 2)])
def test_fp64_agrees_in_the_order_of_ranks(stage, shards):
    spawn(4, close, stage, shards)


def live_bytes():
    """Bytes of all tensors that live in this process, each storage once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor):
            storage = thing.untyped_storage()
            storages[storage.data_ptr() or id(storage)] = storage.nbytes()
    return sum(storages.values())


def memory(stage, size):
    mesh = Mesh.create(Layout(dp=size), timeout_s=30)
    empty = live_bytes()
    model = models.create(shape(width=128, layers=4), 0)
    elements = sum(p.numel() for p in model.parameters())
    outside = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("blocks"))
    block = sum(p.numel() for p in model.blocks[0].parameters())
    sync = engine(model, mesh, stage)
    optimizer = AdamW(sync.parameters, TABLE, sync.matrices)
    whole = []
    for each in model.blocks:
        each.register_forward_hook(lambda *_: whole.append(held(model)))
        each.register_full_backward_hook(lambda *_: whole.append(held(model)))
    for step in batches(1, 2 * size):
        for number, micro in enumerate(step[mesh.rank :: size]):
            sync.begin(last=number == 1)
            loss_of(model, micro, tokens(step)).backward()
        sync.finish()
        del micro
        measured = live_bytes() - empty - sum(b.nbytes for b in model.buffers()) - batches(1, 2 * size).nbytes
        optimizer.step(1e-3)
        sync.sums_of_squares()
        optimizer.zero_grad()
        sync.publish()
    at_rest = live_bytes() - empty - batches(1, 2 * size).nbytes
    return measured, at_rest, elements, max(whole), outside + 2 * block


def held(model):
    """Elements of the model's parameters that have memory now."""
    return sum(p.numel() for p in model.parameters() if p.untyped_storage().nbytes())


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_memory_per_rank_follows_the_formula_within_a_tenth(stage):
    for measured, at_rest, elements, full, working in spawn(4, memory, stage, 4):
        formula = zero_bytes(elements, stage, 4)
        # A stage 1 rank has sent its gradient away by then, too: it keeps a shard like stage 2.
        kept = zero_bytes(elements, max(stage, 2), 4)["gradients"]
        assert measured == pytest.approx(formula["parameters"] + kept + formula["optimizer"], rel=0.1)
        assert at_rest == pytest.approx(formula["parameters"] + formula["optimizer"], rel=0.1)
        if stage == 3:
            assert full <= working


def counted(stage):
    return together(shape(), 4, stage, deterministic=False, steps=1, micro_batches=8)[4]


@pytest.mark.parametrize(
    ("stage", "scattered", "gathered"),
    # 2 micro-batches per rank. Stage 3 gathers for the forward and for the backward of each, but the last block, which
    # the backward begins with, and what is outside of the blocks, only once per micro-batch and step.
    [(1, 1, 1.0), (2, 2, 1.0), (3, 2, None)],
)
def test_bytes_are_those_of_the_formula(stage, scattered, gathered):
    model = models.create(shape(), 0)
    elements = sum(p.numel() for p in model.parameters())
    blocks = sum(p.numel() for n, p in model.named_parameters() if n.startswith("blocks")) / elements
    if gathered is None:
        gathered = 2 * blocks * (2 - 1 / 3) + (1 - blocks)
    for sent in spawn(4, counted, stage):
        unit = elements * 4 * 3 / 4
        reduced = sum(v for k, v in sent.items() if k[2].startswith("gradients"))
        parameters = sum(v for k, v in sent.items() if k[2].startswith("parameters"))
        assert unit * scattered <= reduced <= unit * scattered * 1.1
        assert unit * gathered <= parameters <= unit * gathered * 1.1


def reshaped():
    mesh = Mesh.create(Layout(dp=4), timeout_s=30)
    model = models.create(shape(), 0)
    sync = engine(model, mesh, 3)
    optimizer = AdamW(sync.parameters, TABLE, sync.matrices)
    torch.manual_seed(9)
    values = {
        name: torch.randn(value.shape) for name, value in dict(models.create(shape(), 1).named_parameters()).items()
    }
    shapes = {name: value.shape for name, value in values.items()}
    slots = {f"{slot}/{n}": torch.randn(v.shape) for slot in ("exp_avg", "exp_avg_sq") for n, v in values.items()}
    with torch.no_grad():
        for name, piece in own(sync, values).items():
            sync.parameters[name].copy_(piece)
    for name, piece in own(sync, slots).items():
        optimizer.tensors()[name].copy_(piece)
    sync.publish()
    assert {n: p.numel() for n, p in sync.parameters.items()} == {n: t.numel() for n, t in own(sync, values).items()}
    for given in (values, slots):
        live = {n: p.detach() for n, p in sync.parameters.items()} if given is values else optimizer.tensors()
        back = whole(sync, live, shapes, mesh["dp"])
        assert back.keys() == given.keys()
        assert all(torch.equal(back[name], given[name]) for name in given)
    plain = models.create(shape(), 0)
    plain.load_state_dict(values)
    micro = batches(1, 1)[0, 0]
    with torch.no_grad():
        assert torch.equal(loss_of(plain, micro, 1), loss_of(model, micro, 1))
    assert held(model) == 0


def test_state_goes_out_whole_and_comes_back_in_slices():
    spawn(4, reshaped)


def test_refuses_what_it_cannot_shard():
    model = models.create(shape(), 0)
    with pytest.raises(ValueError, match="stage 4"):
        Zero(model, Axis.single("dp"), 4)
    model.norm.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"frozen: norm\.weight"):
        Zero(model, Axis.single("dp"), 1)
    with pytest.raises(ValueError, match="1 of them have no parameters"):
        Zero(nn.Sequential(nn.Linear(2, 2), nn.Tanh()), Axis.single("dp"), 1, blocks=[nn.Tanh()])


def against_fsdp():
    from torch.distributed.fsdp import fully_shard

    mesh = Mesh.create(Layout(dp=2), timeout_s=30)
    ours, theirs = (models.create(shape(tied=False), 0).double() for _ in range(2))
    sync = engine(ours, mesh, 3)
    for block in theirs.blocks:
        fully_shard(block)
    fully_shard(theirs)
    step = batches(1, 2)[0]
    sync.begin(last=True)
    loss_of(ours, step[mesh.rank], tokens(step)).backward()
    sync.finish()
    loss_of(theirs, step[mesh.rank], tokens(step)).backward()
    shapes = {name: p.shape for name, p in ours.named_parameters()}
    gradients = whole(sync, {name: p.grad for name, p in sync.parameters.items()}, shapes, mesh["dp"])
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(gradients[name], 2 * parameter.grad.full_tensor(), rtol=1e-12, atol=1e-15)


def test_gradients_agree_with_torch_fsdp2_but_for_its_average():
    spawn(2, against_fsdp)
