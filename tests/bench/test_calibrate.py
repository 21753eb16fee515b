"""Calibration: what it writes is a machine that the planner reads, with numbers that can be."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tozan.bench.calibrate import _half_length, calibrate
from tozan.bench.units import fit
from tozan.config.schema import Config
from tozan.cpuinfo import cores
from tozan.planner import predict
from tozan.planner.machine import load


def test_this_machine_can_be_measured(tmp_path):
    found = calibrate(tmp_path / "here.toml", worlds=(2,), seconds=0.005, shrink=16)
    machine = load(str(tmp_path / "here.toml"))
    assert machine.device.peak["fp32"] > 1e6
    assert 0 < found.efficiency <= 1
    assert found.bandwidth > 1e6
    assert machine.cores == cores()
    assert machine.trainer[0].threads == machine.cores
    assert machine.trainer[0].optimizer[0] > 0
    assert {(one.operation, one.ranks) for one in machine.collectives} == {
        (name, 2) for name in ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "send")
    }
    assert "tozan bench calibrate" in machine.sources["all"]
    prediction = predict(Config(version=1, data={"path": "-"}, train={"steps": 1}, model={"vocabulary": 512}), machine)
    assert sum(prediction.phases.values()) == pytest.approx(prediction.seconds)


@given(st.lists(st.floats(1e-12, 1e-9), min_size=3, max_size=3))
def test_fit_finds_the_coefficients_that_made_the_times(coefficients):
    terms = [[1e9, 1e6, 1.0], [1e8, 4e6, 1.0], [3e7, 1e7, 1.0], [1e6, 1e3, 1.0]]
    times = [sum(c * t for c, t in zip(coefficients, row, strict=True)) for row in terms]
    found = fit(terms, times)
    again = [sum(c * t for c, t in zip(found, row, strict=True)) for row in terms]
    assert again == pytest.approx(times, rel=1e-3)
    assert min(found) >= 0


def test_half_length_is_recovered_from_two_rates():
    rate = lambda k: 3e12 * k / (k + 150)  # noqa: E731
    assert _half_length(rate(2048), rate(64), 2048, 64) == pytest.approx(150)
    assert _half_length(1e12, 1e12, 2048, 64) == 0
