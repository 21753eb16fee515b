import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tozan.config.schema import Optim
from tozan.optim.schedule import learning_rate

SCHEDULES = ["cosine", "linear", "wsd", "constant"]


def rates(table: Optim, steps: int) -> list[float]:
    return [learning_rate(table, step, steps) for step in range(steps)]


@given(
    schedule=st.sampled_from(SCHEDULES),
    steps=st.integers(1, 300),
    data=st.data(),
)
def test_rates_stay_between_zero_and_the_peak_and_end_at_the_minimum(schedule, steps, data):
    warmup = data.draw(st.integers(0, steps))
    table = Optim(lr=1.0, min_lr=0.1, schedule=schedule, warmup=warmup)
    got = rates(table, steps)
    assert all(0 < rate <= 1.0 for rate in got)
    rising, falling = got[:warmup], got[warmup:]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    if schedule != "constant" and len(falling) > 1:
        assert falling[-1] == pytest.approx(0.1)


def test_cosine_agrees_with_torch():
    import torch

    steps = 50
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps - 1, eta_min=0.2)
    expected = []
    for _ in range(steps):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    assert rates(Optim(lr=1.0, min_lr=0.2, schedule="cosine"), steps) == pytest.approx(expected)


def test_wsd_holds_the_peak_until_its_decay():
    got = rates(Optim(lr=1.0, schedule="wsd", warmup=10, decay=20), 100)
    assert got[9:80] == [1.0] * 71
    assert got[80] == pytest.approx(0.95)
    assert got[99] == 0.0
    assert math.isclose(got[0], 0.1)
