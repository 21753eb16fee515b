import math

import pytest

from tozan.amounts import duration, percent, scaled


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (1.8e11, "FLOP/s", "180 GFLOP/s"),
        (2.04e12, "FLOP/s", "2.04 TFLOP/s"),
        (math.nan, "FLOP/s", "—"),
        (9.996e8, "B/s", "1 GB/s"),
        (0.0, "B", "0 B"),
        (0.5, "B", "0.5 B"),
        (2e-5, "s", "20 µs"),
        (-0.25, "s", "-250 ms"),
    ],
)
def test_scaled(value, unit, text):
    assert scaled(value, unit) == text


def test_percent():
    assert [percent(share) for share in (0.344, 0.00012, math.inf)] == ["34.4%", "0.012%", "—"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (3.21, "3.2 s"),
        (9.97, "10 s"),
        (59.6, "1 min 00 s"),
        (200, "3 min 20 s"),
        (7500, "2 h 05 min"),
        (270_000, "3 d 3 h"),
        (math.nan, "—"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text
