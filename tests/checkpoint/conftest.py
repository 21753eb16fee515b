from __future__ import annotations

import pytest
import torch

from tozan.checkpoint import State


def state_of(step: int) -> State:
    """A small state of every kind of tensor, in which every tensor depends on the step."""
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(40, 30, generator=generator)
    tensors = {
        "model/embed.weight": weight,
        "model/norm.weight": weight[0].clone().bfloat16(),
        "optimizer/exp_avg/embed.weight": weight.T * 2,
        "optimizer/step": torch.tensor(step),
        "rng/cpu": torch.randint(0, 256, (100,), generator=generator, dtype=torch.uint8),
    }
    return State(step, tensors, {"samples": step * 8, "scale": None}, {"tokenizer.json": b'{"step": %d}' % step})


@pytest.fixture
def make_state():
    return state_of


@pytest.fixture(autouse=True)
def _forkable(one_thread):
    """Forked children must not inherit a pool of threads that no longer exists."""


def same(one: State, other: State) -> bool:
    return (
        one.step == other.step
        and one.meta == other.meta
        and one.files == other.files
        and one.tensors.keys() == other.tensors.keys()
        and all(
            a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
            for a, b in ((one.tensors[name], other.tensors[name]) for name in one.tensors)
        )
    )


@pytest.fixture
def equal():
    return same
