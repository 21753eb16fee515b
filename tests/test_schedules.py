"""Schedules: complete, ordered, deadlock-free, and with the published peaks and bubbles."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tozan import schedules
from tozan.schedules import Action, Schedule


@st.composite
def any_schedule(draw):
    name = draw(st.sampled_from(["gpipe", "1f1b", "interleaved", "zero-bubble"]))
    stages = draw(st.integers(1, 7))
    if name == "interleaved":
        return schedules.create(name, stages, stages * draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    return schedules.create(name, stages, draw(st.integers(1, 20)))


def makespan(schedule, forward=1.0, backward=2.0, backward_weight=1.0):
    """Total time if a whole stage takes `forward` and `backward` per micro-batch."""
    times = {
        "forward": forward / schedule.chunks,
        "backward": backward / schedule.chunks,
        "backward_input": (backward - backward_weight) / schedule.chunks,
        "backward_weight": backward_weight / schedule.chunks,
    }
    return max(step.end for step in schedules.replay(schedule, lambda _, action: times[action.kind]))


@given(any_schedule())
def test_every_microbatch_goes_forward_and_back_once_per_chunk(schedule):
    pairs = {(m, c) for m in range(schedule.microbatches) for c in range(schedule.chunks)}
    kinds = {"forward", "backward"}
    if schedule.name == "zero-bubble":
        kinds = {"forward", "backward_input", "backward_weight"}
    for actions in schedule.actions:
        assert len(actions) == len(pairs) * len(kinds)
        assert set(actions) == {Action(kind, *pair) for kind in kinds for pair in pairs}


@given(any_schedule())
def test_own_order(schedule):
    for actions in schedule.actions:
        place = {action: i for i, action in enumerate(actions)}
        for kind, microbatch, chunk in actions:
            before = {"backward": "forward", "backward_input": "forward", "backward_weight": "backward_input"}
            if kind in before:
                assert place[Action(before[kind], microbatch, chunk)] < place[Action(kind, microbatch, chunk)]


@given(any_schedule())
def test_gradients_of_a_chunk_are_summed_in_microbatch_order(schedule):
    last = "backward_weight" if schedule.name == "zero-bubble" else "backward"
    for actions in schedule.actions:
        for chunk in range(schedule.chunks):
            order = [a.microbatch for a in actions if a.kind == last and a.chunk == chunk]
            assert order == sorted(order)


@given(any_schedule(), st.integers(0, 2**32))
def test_no_deadlock_and_dependencies_hold_whatever_the_times(schedule, seed):
    def seconds(stage, action):
        return 0.1 + random.Random(f"{seed} {stage} {action}").random()

    def transfer(stage, action):
        return 0.1 * random.Random(f"{action} {stage} {seed}").random()

    steps = schedules.replay(schedule, seconds, transfer)
    assert len(steps) == sum(map(len, schedule.actions))
    end = {(step.stage, step.action): step.end for step in steps}
    free = [0.0] * schedule.stages
    for step in steps:
        assert step.start >= free[step.stage]
        free[step.stage] = step.end
        need = schedule.waits_for(step.stage, step.action)
        if need is not None:
            wait = transfer(step.stage, step.action) if need[0] != step.stage else 0.0
            assert step.start >= end[need] + wait - 1e-9


@given(any_schedule())
def test_sends_match_waits(schedule):
    """What one action sends is what exactly one other waits for: sends and receives pair up."""
    for stage, actions in enumerate(schedule.actions):
        for action in actions:
            need = schedule.waits_for(stage, action)
            if need is not None:
                assert schedule.sends_to(*need) == stage


@given(any_schedule())
def test_peak_in_flight_as_published(schedule):
    p, m, v = schedule.stages, schedule.microbatches, schedule.chunks
    for stage in range(p):
        peak = schedule.peak_in_flight(stage)
        if schedule.name == "gpipe":
            assert peak == m
        elif schedule.name == "1f1b":
            assert peak == min(m, p - stage)
        elif schedule.name == "zero-bubble":
            assert peak <= min(m, p)
        else:
            assert peak == min(m * v, 2 * (p - 1 - stage) + (v - 1) * p + 1)
    if schedule.name == "interleaved" and m > p:
        # Korthikanti et al., arXiv 2205.05198, section 4.2.3: L (1 + (p − 1) / (p v)) layers on the first stage.
        assert schedule.peak_in_flight(0) == pytest.approx(p * v * (1 + (p - 1) / (p * v)))


@given(any_schedule(), st.floats(0.5, 2.0), st.floats(1.0, 4.0))
def test_bubble_equals_the_published_formula(schedule, forward, backward):
    if schedule.name == "zero-bubble":
        if schedule.microbatches < schedule.stages:
            return  # the formula is for a pipeline that fills
        backward, weight = 2 * forward, forward  # the paper's closed form supposes no stage starves
    else:
        weight = backward / 2
    total = makespan(schedule, forward, backward, weight)
    formula = schedules.bubble(schedule.name, schedule.stages, schedule.chunks, forward, backward, weight)
    assert total == pytest.approx(schedule.microbatches * (forward + backward) + formula)


def test_zero_bubble_has_a_third_of_the_bubble():
    work = 3 * 16.0
    assert makespan(schedules.zero_bubble(4, 16)) - work == pytest.approx(3.0)
    assert makespan(schedules.one_forward_one_backward(4, 16)) - work == pytest.approx(9.0)


@settings(max_examples=20)
@given(st.integers(2, 8), st.integers(1, 3), st.integers(2, 4))
def test_interleaving_divides_the_bubble(stages, packs, chunks):
    plain = makespan(schedules.one_forward_one_backward(stages, stages * packs))
    woven = makespan(schedules.interleaved(stages, stages * packs, chunks))
    work = 3.0 * stages * packs
    assert woven - work == pytest.approx((plain - work) / chunks)


def test_replay_names_a_deadlock():
    good = schedules.gpipe(2, 1)
    turned = tuple(reversed(good.actions[0]))
    with pytest.raises(ValueError, match="deadlock"):
        schedules.replay(Schedule("gpipe", 2, 1, 1, (turned, good.actions[1])), lambda *_: 1.0)


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [
        ("interleaved", (4, 6, 2), "6 micro-batches are not a multiple of 4 stages"),
        ("1f1b", (4, 6, 2), "only the interleaved"),
        ("gpipe", (0, 1), "needs ≥ 1"),
    ],
)
def test_refuses_what_it_cannot_do(name, sizes, message):
    with pytest.raises(ValueError, match=message):
        schedules.create(name, *sizes)
