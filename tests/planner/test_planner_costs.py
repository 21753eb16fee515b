"""Costs: closed forms against the replayed schedule, kernels and collectives against their laws."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tozan.models.arithmetic import Shape, hardware_flops, model_flops
from tozan.planner import collectives, costs, kernels, layer, stacks
from tozan.planner.candidates import candidates
from tozan.planner.layer import Job
from tozan.planner.machine import load
from tozan.planner.memory import memory
from tozan.planner.published import gpt
from tozan.planner.simulate import timeline

A100 = load("a100-80")


def job(shape=None, batch=64, stack=stacks.MEGATRON_2021, machine=A100):
    return Job(shape or gpt(2048, 24, 16, 1024), machine, stack, batch)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([1, 2, 3, 4, 5, 6, 8]),
    st.sampled_from([1, 2, 3]),
    st.sampled_from([2, 4, 8]),
    st.booleans(),
    st.sampled_from([2048, 51200]),
)
def test_pipeline_closed_form_is_the_replayed_schedule(pp, chunks, packs, zero_bubble, vocabulary):
    """Even and uneven stages, a light or a heavy head: the search's closed form agrees with the clock."""
    zero_bubble = zero_bubble and pp > 1
    chunks = 1 if pp == 1 or zero_bubble or 48 % (pp * chunks) else chunks
    priced = job(gpt(2048, 48, 16, 1024, vocabulary), pp * packs)
    c = candidates(pp=pp, chunks=chunks, zero_bubble=int(zero_bubble), recompute="none")
    cost = costs.step(priced, c)
    closed = float(cost.seconds[0] - cost.parts["data"][0] - cost.parts["optimizer"][0])
    replayed = max(step.end for step in timeline(priced, c))
    assert closed == pytest.approx(replayed, rel=0.02)


def test_parts_sum_to_the_step():
    c = candidates(pp=[1, 2, 4], dp=[8, 4, 2], tp=[1, 2, 4], micro_batch=2, recompute="full", zero=[0, 1, 0])
    cost = costs.step(job(), c)
    assert sum(cost.parts.values()) == pytest.approx(cost.seconds)
    assert all((value >= -1e-9).all() for value in cost.parts.values())


def test_a_row_of_candidates_costs_what_each_costs_alone():
    values = {"pp": [1, 2, 4, 8], "dp": [8, 4, 2, 1], "tp": [1, 2, 2, 4], "micro_batch": [1, 2, 1, 4], "recompute": 2}
    together = costs.step(job(), candidates(**values)).seconds
    for index in range(4):
        one = {key: value[index] if isinstance(value, list) else value for key, value in values.items()}
        assert costs.step(job(), candidates(**one)).seconds[0] == pytest.approx(together[index])


def test_gemm_is_bounded_by_peak_and_bandwidth():
    device = A100.device
    for m, n, k in [(8192, 8192, 8192), (1, 4096, 4096), (100, 64, 64), (4096, 4096, 1)]:
        seconds = float(kernels.gemm(device, "bf16", m, n, k))
        assert seconds >= 2 * m * n * k / device.peak["bf16"]
        assert seconds >= 2 * (m * k + k * n + m * n) / device.bandwidth


def test_gemm_has_waves():
    """One tile more than the units hold starts a new wave."""
    device = A100.device
    columns = 128 * device.gemm.units // 2
    full = float(kernels.gemm(device, "bf16", 512, columns, 8192))
    more = float(kernels.gemm(device, "bf16", 512 + 128, columns, 8192))
    assert more / full > 1.25


@given(st.integers(2, 512), st.floats(1e3, 1e10))
def test_all_reduce_is_reduce_scatter_and_all_gather(size, moved):
    whole = float(collectives.all_reduce(A100, moved, size, 1))
    halves = 2 * float(collectives.all_gather(A100, moved, size, 1))
    assert 0 < whole <= halves * 1.2 + 1e-3
    assert whole >= 2 * (size - 1) / size * moved / A100.node.bandwidth


def test_groups_that_share_network_cards_lose_links():
    """Two or four devices of a node's eight have the stated links; one alone, and all eight, have their own."""
    own = A100.network.bandwidth * A100.network.efficiency
    few = A100.changed(network={"shared": 0.4, "congestion": 0.0})
    for stride, links in ((8, 1.0), (4, 0.4), (2, 0.4), (1, 8.0)):
        expected = min(links * own, A100.node.bandwidth)
        assert float(collectives.bandwidth(few, 64, stride)) == pytest.approx(expected)
    assert float(collectives.bandwidth(few, 2, 1)) == A100.node.bandwidth


def test_groups_of_one_are_free():
    for operation in (collectives.all_reduce, collectives.all_gather, collectives.broadcast):
        assert float(operation(A100, 1e9, 1, 1)) == 0


def test_a_linear_rank_map_on_a_torus_is_slower_for_strided_groups():
    fugaku = load("fugaku-2.0")
    linear = fugaku.changed(network={"rank_map": "linear"})
    strided = [float(collectives.all_reduce(machine, 1e9, 64, 48)) for machine in (fugaku, linear)]
    assert strided[1] > 4 * strided[0]
    neighbours = [float(collectives.all_reduce(machine, 1e9, 64, 1)) for machine in (fugaku, linear)]
    assert neighbours[0] == neighbours[1]


def test_recomputation_repeats_the_forward_pass():
    priced = job()
    none, full = (costs.step(priced, candidates(recompute=kind)).parts for kind in ("none", "full"))
    block = layer.block(priced, candidates())
    forward = float(block.forward["matrix"][0]) * priced.shape.layers * priced.global_batch
    assert float(full["matrix"][0] - none["matrix"][0]) == pytest.approx(forward)
    assert hardware_flops(priced.shape, "full") > model_flops(priced.shape)


def test_grids_move_less_than_flat_tensor_parallelism_on_many_ranks():
    """Tesseract's claim (arXiv 2105.14500): 2.5D beats 1D in communication where the group is large."""
    shape = Shape("gpt2", 4, 16384, 64, 64, 65536, 51200, 2048)
    fugaku = load("fugaku-2.0")
    priced = Job(shape, fugaku, stacks.TOZAN, 64, "fp32")
    flat = costs.step(priced, candidates(tp=64, micro_batch=16)).parts["tensor"]
    cube = costs.step(priced, candidates(tp=64, grid=4, depth=4, micro_batch=16)).parts["tensor"]
    assert float(cube[0]) < float(flat[0])


def test_noise_saturates_at_one_delay_per_synchronisation():
    noisy = A100.changed(noise={"rate": 1.0, "delay": 0.5})
    priced = job(batch=64, machine=noisy)
    noise = float(costs.step(priced, candidates(dp=64)).parts["noise"][0])
    assert 0 < noise <= 0.5


def test_host_and_device_hide_behind_each_other_but_not_quite():
    """Never faster than the slower of both, never slower than one after the other; jitter grows with the ranks."""
    machine = load("a100-80")
    layouts = candidates(tp=[1, 2, 4, 8, 1, 2, 4, 8], micro_batch=[1, 1, 1, 1, 16, 16, 16, 16])
    shape = gpt(2048, 24, 16, 1024)
    stages = {
        host: costs.stages(Job(shape, machine.changed(device={"host": host}), stacks.MEGATRON_2021, 64), layouts)
        for host in (1e-9, 28e-6)
    }
    device, both = (stages[host].forward for host in (1e-9, 28e-6))
    calm = machine.changed(device={"host": 28e-6}, node={"jitter": 0.0})
    ahead, _ = layer.operations(Job(shape, calm, stacks.MEGATRON_2021, 64), layouts)
    host = 24 * 28e-6 * (ahead + 2 * layer.COLLECTIVE * (layouts.tp > 1)) + 48 * machine.node.jitter * np.log2(
        layouts.tp
    )
    assert (both >= np.maximum(device, host) * (1 - 1e-3)).all()
    assert (both <= device + host).all()
    assert (both / np.maximum(device, host))[4] < 1.02, "large micro-batches hide the host"
    still = costs.stages(Job(shape, calm, stacks.MEGATRON_2021, 64), layouts).forward
    assert (np.diff((both - still)[:4]) > 0).all()


def test_an_unpadded_vocabulary_slows_the_head():
    def head(vocabulary, tp):
        priced = Job(gpt(2048, 24, 16, 1024, vocabulary), load("a100-80"), stacks.MEGATRON_2021, 8)
        return float(costs.stages(priced, candidates(tp=tp)).head[0])

    assert head(50257, 1) > 1.2 * head(50304, 1)
    assert head(50256, 1) == pytest.approx(head(50304, 1), rel=0.01)
    assert head(50256, 2) == pytest.approx(head(50304, 2), rel=0.01)


@pytest.mark.parametrize("stack", [stacks.MEGATRON_2021, stacks.MEGATRON_CORE, stacks.TOZAN])
def test_layouts_of_any_size_have_finite_costs_that_keep_their_order(stack):
    """Twice the replicas halve the work; twice the micro-batch never takes less memory; nothing is negative."""
    names = ("pp", "dp", "tp", "micro_batch", "recompute", "zero", "sequence_parallel")
    powers = [1, 2, 8, 64]
    every = product(powers, powers, [1, 2, 8], [1, 2, 16], [0, 1, 2], [0, 1, 3], [0, 1])
    values = dict(zip(names, map(np.array, zip(*every, strict=True)), strict=True))
    priced = job(gpt(6144, 64, 64, 2048), 4096, stack)
    one, twice, larger = (
        candidates(**(values | change))
        for change in ({}, {"dp": 2 * values["dp"]}, {"micro_batch": 2 * values["micro_batch"]})
    )
    cost, more = costs.step(priced, one), costs.step(priced, twice)
    assert (np.isfinite(cost.seconds) & (cost.seconds > 0)).all()
    assert all((part >= -1e-9 * cost.seconds).all() for part in cost.parts.values())
    for kind in ("matrix", "attention", "elementwise"):
        assert more.parts[kind] == pytest.approx(cost.parts[kind] / 2)
    held, widened = memory(priced, one).total, memory(priced, larger).total
    assert (np.isfinite(held) & (held > 0) & (widened >= held)).all()
