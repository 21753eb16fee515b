"""The order of samples: bijective for any size, reached at once, different for each seed and epoch."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tozan.data import order


@given(count=st.integers(1, 5000), seed=st.integers(-(2**70), 2**70))
@settings(max_examples=60, deadline=None)
def test_permutation_visits_each_place_once(count: int, seed: int):
    keys = order.derive(seed, "test", count=order.ROUNDS)
    places = order.permute(np.arange(count, dtype=np.uint64), count, keys)
    assert sorted(places.tolist()) == list(range(count))


@given(count=st.integers(1, 2**62), data=st.data())
@settings(max_examples=60, deadline=None)
def test_huge_permutations_stay_inside_and_do_not_collide(count: int, data: st.DataObject):
    positions = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=50, unique=True))
    places = order.permute(np.array(positions, dtype=np.uint64), count, order.derive(0, count=order.ROUNDS))
    assert (places < np.uint64(count)).all()
    assert len(set(places.tolist())) == len(positions)


@given(
    windows=st.integers(1, 40),
    sequence=st.integers(1, 9),
    first=st.integers(0, 10**14),
    cuts=st.lists(st.integers(0, 60), max_size=4),
)
@settings(max_examples=60, deadline=None)
def test_samples_do_not_depend_on_how_they_are_asked_for(windows: int, sequence: int, first: int, cuts: list[int]):
    whole = order.starts(first, 60, windows=windows, sequence=sequence, seed=3)
    edges = [0, *sorted(cuts), 60]
    parts = [
        start
        for a, b in pairwise(edges)
        for start in order.starts(first + a, b - a, windows=windows, sequence=sequence, seed=3)
    ]
    assert parts == whole


def test_an_epoch_has_every_window_once_under_one_phase():
    windows, sequence = 37, 8
    for epoch in (0, 1, 10**9):
        starts = order.starts(epoch * windows, windows, windows=windows, sequence=sequence, seed=5)
        phases = {start % sequence for start in starts}
        assert len(phases) == 1
        assert sorted(start // sequence for start in starts) == list(range(windows))


def test_seeds_epochs_and_attempts_give_other_orders():
    def epoch(number: int, seed: int = 0, attempt: int = 0) -> tuple[int, ...]:
        return tuple(order.starts(number * 50, 50, windows=50, sequence=1, seed=seed, attempt=attempt))

    orders = [epoch(number) for number in range(20)] + [epoch(0, seed) for seed in range(1, 20)] + [epoch(0, 0, 1)]
    assert len(set(orders)) == len(orders)


@pytest.mark.parametrize("count", [2, 5, 16, 33])
def test_every_place_is_equally_likely(count: int):
    """Pearson's χ² over 2,000 seeds: each position must reach each place about equally often."""
    trials = 2000
    table = np.zeros((count, count))
    for seed in range(trials):
        places = order.permute(np.arange(count, dtype=np.uint64), count, order.derive(seed, count=order.ROUNDS))
        table[np.arange(count), places] += 1
    chi2 = ((table - trials / count) ** 2 / (trials / count)).sum()
    freedom = (count - 1) ** 2
    assert chi2 < freedom + 6 * (2 * freedom) ** 0.5 + 10
