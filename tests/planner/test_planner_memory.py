"""Memory: the published formulas, and the shards that the trainer would cut."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tozan import layout
from tozan.models.arithmetic import parameters
from tozan.planner import costs, stacks
from tozan.planner.candidates import candidates
from tozan.planner.layer import Job
from tozan.planner.machine import load
from tozan.planner.memory import by_block, in_flight, kept_activations, memory, state_bytes
from tozan.planner.published import gpt, llama
from tozan.schedules import create

A100 = load("a100-80")


def korthikanti(s, b, h, a, t, mode):
    """Bytes per block: equations 1 to 4 of arXiv 2205.05198, and 2sbh for full recomputation."""
    sbh = s * b * h
    return {
        "none": sbh * (10 + 24 / t + 5 * a * s / (h * t)),
        "seq": sbh / t * (34 + 5 * a * s / h),
        "selective": sbh * (10 + 24 / t),
        "both": sbh * 34 / t,
        "full": 2 * sbh,
    }[mode]


@pytest.mark.parametrize("mode", ["none", "seq", "selective", "both", "full"])
@pytest.mark.parametrize(("h", "a", "t", "b"), [(6144, 64, 8, 4), (12288, 96, 8, 1), (1024, 16, 2, 3)])
def test_activations_are_korthikantis(h, a, t, b, mode):
    job = Job(gpt(h, 8, a, 2048), A100, stacks.MEGATRON_2022, 64)
    recompute = {"selective": "selective", "both": "selective", "full": "full"}.get(mode, "none")
    c = candidates(tp=t, micro_batch=b, sequence_parallel=int(mode in ("seq", "both")), recompute=recompute)
    assert float(kept_activations(job, c)[0]) == pytest.approx(korthikanti(2048, b, h, a, t, mode))


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4]), st.integers(1, 4))
def test_in_flight_is_what_the_schedules_hold(pp, packs, chunks):
    chunks = 1 if pp == 1 else chunks
    job = Job(gpt(1024, 32, 16, 1024), A100, stacks.MEGATRON_2021, pp * (packs + 1))
    schedule = create("interleaved" if chunks > 1 else "1f1b", pp, pp * (packs + 1), chunks)
    first, last = (float(value[0]) for value in in_flight(job, candidates(pp=pp, chunks=chunks)))
    assert first * chunks == pytest.approx(schedule.peak_in_flight(0))
    assert last * chunks == pytest.approx(schedule.peak_in_flight(pp - 1))


@given(st.integers(1, 10**9), st.integers(1, 64), st.integers(0, 3))
def test_state_is_that_of_the_layout(elements, ranks, zero):
    job = Job(gpt(1024, 8, 16, 1024), A100, stacks.TOZAN, 64)
    found = state_bytes(job, candidates(dp=ranks, zero=zero), np.array([float(elements)]))
    exact = layout.zero_bytes(elements, zero, ranks, 4, 4, 8)
    assert {key: float(value[0]) for key, value in found.items()} == exact


@pytest.mark.parametrize("shape", [gpt(768, 12, 12, 1024, 50304), llama(512, 8, 8, 4, 1408, 32000, 512)])
def test_one_device_holds_every_parameter(shape):
    job = Job(shape, A100, stacks.TOZAN, 64)
    blocks, ends = costs.stage_parameters(job, candidates())
    norm = shape.width * (2 if shape.family == "gpt2" else 1)
    assert float(blocks[0] + ends[0]) + norm == parameters(shape)


@pytest.mark.parametrize(
    "values", [{"tp": 4}, {"tp": 4, "grid": 2}, {"tp": 8, "grid": 2, "depth": 2}, {"tp": 2, "pp": 4}]
)
def test_vectorised_shards_are_the_layouts_shards(values):
    job = Job(gpt(768, 12, 12, 1024), A100, stacks.TOZAN, 64)
    c = candidates(**values)
    rows = by_block(job, c, 0)
    blocks, _ = costs.stage_parameters(job, c)
    first = [row for row in rows if row["stage"] == 0]
    assert sum(row["parameters"] for row in first) == pytest.approx(float(blocks[0]))
    assert [row["block"] for row in rows] == list(range(12))


def test_what_did_not_fit_does_not_fit():
    """SC21's table 2: 530B with ZeRO-3 and micro-batch 4 ran out of memory on 560 A100-80GB."""
    job = Job(gpt(20480, 105, 128, 2048), A100, stacks.ZERO_2021, 2240)
    assert not memory(job, candidates(dp=560, micro_batch=4, zero=3, recompute="full")).fits(job)[0]


def test_offload_moves_the_optimizer_to_the_host():
    job = Job(gpt(4096, 32, 32, 2048), A100, stacks.MEGATRON_2021, 64)
    here, there = (memory(job, candidates(offload=place)) for place in ("none", "ram"))
    assert float(there.parts["optimizer"][0]) == 0
    assert float(there.host[0]) >= float(here.parts["optimizer"][0])
