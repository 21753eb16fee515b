"""Measured units added up: by hand for simple layouts, and what real runs hold in memory."""

import dataclasses

import pytest
import torch

from tozan import models
from tozan.layout import Layout
from tozan.models.arithmetic import Shape, block_matrices
from tozan.parallel import recompute
from tozan.planner import local, stacks, traffic
from tozan.planner.books import Trip
from tozan.planner.candidates import candidates
from tozan.planner.layer import Job
from tozan.planner.machine import Crowd, Machine, Measured, Trainer, load
from tozan.planner.memory import kept_activations
from tozan.planner.resident import _activations, resident

SHAPE = Shape("gpt2", 4, 256, 4, 4, 1024, 2048, 128)
UNIT = Trainer(
    precision="bf16",
    threads=1,
    linear_forward=(1e-11, 0, 0, 0),
    linear_backward=(2e-11, 0, 0, 0),
    **{f"{name}_{way}": (0, 0) for name in ("norm", "gelu", "swiglu") for way in ("forward", "backward")},
    attention_forward=(0, 0, 0, 0),
    attention_backward=(0, 0, 0, 0),
    head=(0, 0, 0, 0),
    embedding=(0, 0, 0),
    optimizer=(1e-9,),
)


def machine(cores: int) -> Machine:
    rows = [Measured(operation=name, ranks=2, latency=1e-4, rate=1e9) for name in ("all_reduce", "all_gather", "send")]
    return load("xeon-amx").model_copy(update={"cores": cores, "trainer": (UNIT,), "collectives": tuple(rows)})


def trip(**layout: int) -> Trip:
    return Trip(SHAPE, Layout(**layout), micro_batch=2, accumulate=4, item=2)


def products() -> float:
    """FLOPs of one micro-batch's forward products in all blocks."""
    return 2 * 2 * 128 * 4 * sum(rows * columns for rows, columns in block_matrices(SHAPE).values())


def test_one_rank_is_its_products_and_its_optimizer():
    phases = local.step(trip(), machine(1), "bf16")
    assert phases["forward"] == pytest.approx(4 * products() * 1e-11)
    assert phases["backward"] == pytest.approx(4 * products() * 2e-11)
    assert set(phases) == {"forward", "backward", "optimizer", "bubble"}


def test_ranks_that_share_a_core_take_turns():
    """Two stages on one core do the work of one rank, without a bubble; on two cores they wait as 1F1B does."""
    alone, shared, apart = (local.step(trip(pp=pp), machine(cores), "bf16") for pp, cores in ((1, 1), (2, 1), (2, 2)))
    work = alone["forward"] + alone["backward"]
    assert shared["forward"] + shared["backward"] == pytest.approx(work)
    assert shared["bubble"] == pytest.approx(0)
    assert apart["bubble"] == pytest.approx(work / 2 / 4)


def test_a_core_waits_for_the_first_micro_batch_to_reach_its_stages():
    """Four stages on two cores: the second and the fourth begin after the forward pass of the first."""
    phases = local.step(trip(pp=4), machine(2), "bf16")
    assert phases["bubble"] == pytest.approx(products() / 4 * (1e-11 + 2e-11))


def test_a_tied_embedding_in_a_pipeline_makes_its_logits_twice():
    """One process makes three products with the vocabulary; the last of two stages two, and two more when it may."""
    unit = UNIT.model_copy(update={"linear_forward": (0,) * 4, "linear_backward": (0,) * 4, "head": (1e-12, 0, 0, 0)})
    tools = machine(1).model_copy(update={"trainer": (unit,)})
    alone, tied = (local.step(trip(pp=pp), tools, "bf16") for pp in (1, 2))
    parts = dataclasses.replace(trip(pp=2), shape=dataclasses.replace(SHAPE, tied=False))
    apart = local.step(parts, tools, "bf16")
    one, two, three = (sum(x[name] for name in ("forward", "backward", "bubble")) for x in (alone, tied, apart))
    assert three == pytest.approx(one)
    assert two == pytest.approx(4 / 3 * one)


def test_ranks_that_share_a_core_are_slower_than_their_turns():
    crowd = machine(2).model_copy(update={"crowding": (Crowd(ranks=4, slowdown=1.1), Crowd(ranks=8, slowdown=1.3))})
    for ranks, slowdown in ((2, 1.0), (4, 1.1), (8, 1.3)):
        phases = local.step(trip(dp=ranks), crowd, "bf16")
        assert phases["forward"] == pytest.approx(max(1, ranks / 2) * slowdown * 4 * products() * 1e-11)


def test_communication_is_what_the_ledger_counts_at_the_measured_rate():
    phases = local.step(trip(tp=2), machine(2), "bf16")
    books = traffic.books(trip(tp=2), 0)
    sent = [sent for (axis, _, _), sent in books.sent.items() if axis == "world"]
    assert phases["communication/world"] == pytest.approx(len(sent) * 1e-4 + sum(sent) / 1e9)


def test_communication_is_that_of_the_groups_which_were_measured():
    """Rows and columns of a grid of four: pairs two apart and side by side, of a node of four and not of two."""
    rows = [
        Measured(operation="broadcast", world=world, ranks=2, stride=stride, latency=latency, rate=1e9)
        for world, stride, latency in ((2, 1, 1.0), (4, 1, 2.0), (4, 2, 3.0))
    ]
    grid = Trip(SHAPE, Layout(tp=4, scheme="2d"), micro_batch=2, accumulate=4, item=2)
    phases = local.step(grid, machine(2).model_copy(update={"collectives": tuple(rows)}), "bf16")
    books = traffic.books(grid, 0)
    panels = {axis: calls for (axis, operation, _), calls in books.calls.items() if operation == "broadcast"}
    assert phases["communication/tp_col"] == pytest.approx(2 * panels["tp_col"], rel=0.01)
    assert phases["communication/tp_row"] == pytest.approx(3 * panels["tp_row"], rel=0.01)


def test_tensor_parallel_ranks_have_products_and_a_head_of_their_own():
    """On a grid of four every rank makes a quarter of each product, in two parts; the vocabulary is halved."""
    none = (0, 0, 0, 0)
    own = {"grid_forward": (5e-11, 0, 0, 0), "grid_backward": none, "sharded_head": (0, 1e-9, 0, 0)}
    tools = machine(4).model_copy(update={"trainer": (UNIT.model_copy(update=own),), "collectives": ()})
    grid = Trip(SHAPE, Layout(tp=4, scheme="2d"), micro_batch=2, accumulate=4, item=2)
    logits = 4 * (2 * 128 // 2) * (2048 // 2)
    assert local.step(grid, tools, "bf16")["forward"] == pytest.approx(4 * products() / 4 * 5e-11 + logits * 1e-9)


def test_stages_take_what_their_layers_and_recomputation_take():
    """Three of four blocks on the first stage, which also computes them again: on one core each."""
    whole = local.step(trip(), machine(1), "bf16")
    uneven = dataclasses.replace(trip(pp=2), split=(3, 1), recompute_stages=("full", "none"))
    phases = local.step(uneven, machine(2), "bf16")
    assert phases["forward"] == pytest.approx(3 / 4 * whole["forward"])
    assert phases["backward"] == pytest.approx(3 / 4 * (whole["backward"] + whole["forward"]))
    turns = local.step(uneven, machine(1), "bf16")
    assert turns["backward"] == pytest.approx(whole["backward"] + 3 / 4 * whole["forward"])


def test_a_ring_shares_tokens_and_the_causal_half():
    """n ranks on one core do one rank's products; each of the ring's n steps attends to half a block of T/n tokens."""
    flop = {"attention_forward": (1e-12, 0, 0, 0), "attention_backward": (3e-12, 0, 0, 0)}
    tools = machine(1).model_copy(update={"trainer": (UNIT.model_copy(update=flop),)})
    alone, ring = (local.step(trip(**layout), tools, "bf16") for layout in ({}, {"cp": 2}))
    assert ring["forward"] == pytest.approx(alone["forward"])
    assert ring["backward"] == pytest.approx(alone["backward"])
    measured = {"ring_forward": (2e-12, 0, 0, 0), "ring_backward": (3e-12, 0, 0, 0)}
    slower = tools.model_copy(update={"trainer": (UNIT.model_copy(update=flop | measured),)})
    scores = 4 * 4 * 2 * 4 * 128 * 128 / 2  # micro-batches, blocks, samples, heads, causal half
    found = local.step(trip(cp=2), slower, "bf16")
    assert found["forward"] - ring["forward"] == pytest.approx(1e-12 * 4 * scores * 64)


def test_llama_has_norms_of_its_own_and_turns_queries_and_keys():
    """Nine norms of four blocks and the last; queries of four heads and keys of two, of 64 each, in every block."""
    own = {
        "rms_forward": (1e-9, 0),
        "rms_backward": (2e-9, 0),
        "rotary_forward": (3e-9, 0),
        "rotary_backward": (4e-9, 0),
    }
    plain = {"norm_forward": (0, 0), "norm_backward": (0, 0)}
    llama = dataclasses.replace(trip(), shape=dataclasses.replace(SHAPE, family="llama", kv_heads=2))
    without, with_own = (
        local.step(llama, machine(1).model_copy(update={"trainer": (UNIT.model_copy(update=units),)}), "bf16")
        for units in (plain, plain | own)
    )
    tokens, calls = llama.micro_batch * llama.tokens, llama.accumulate
    turned = 4 * tokens * (4 + 2) * 64
    both = with_own["forward"] + with_own["backward"] - without["forward"] - without["backward"]
    assert both == pytest.approx(calls * (9 * tokens * 256 * 3e-9 + turned * 7e-9))


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_block_keeps_what_autograd_keeps(family, mode):
    """Bytes of the tensors that a real block saves in bf16, its weights' copies left out; the search counts alike."""
    shape = dataclasses.replace(SHAPE, family=family, kv_heads=2, mlp_width=640, sequence=160)
    model = models.create(shape, 0)
    recompute.apply(model, mode)
    saved = {}

    def keep(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    copies = {tuple(p.shape) for name, p in model.blocks[0].named_parameters() if p.ndim == 2}
    copies |= {size[::-1] for size in copies}
    x = torch.randn(2, 160, 256, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        y = model.blocks[0](x)
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    bytes_kept = sum(
        tensor.untyped_storage().nbytes()
        for place, tensor in saved.items()
        if place not in own and (tensor.dtype != torch.bfloat16 or tuple(tensor.shape) not in copies)
    )
    assert y.shape == x.shape
    trip = Trip(shape, Layout(), micro_batch=2, accumulate=1, item=2, recompute=mode)
    # Beside what counts: means and variances, a number per token.
    assert bytes_kept == pytest.approx(_activations(trip, mode), rel=0.02)
    job = Job(shape, machine(1), stacks.TOZAN, 2, "bf16")
    assert float(kept_activations(job, candidates(micro_batch=2, recompute=mode))[0]) == _activations(trip, mode)


def test_more_is_held_with_more_at_once():
    held = [sum(resident(dataclasses.replace(trip(), **change), machine(1)).values()) for change in (
        {"recompute": "full"}, {"recompute": "selective"}, {}, {"micro_batch": 4},
    )]  # fmt: skip
    assert held == sorted(held)
    assert len(set(held)) == 4
