"""Calibration: what it writes is a machine that the planner reads, with numbers that can be."""

import pytest

from tozan.bench.calibrate import Measured, _half_length, calibrate, toml
from tozan.planner.machine import load

FOUND = Measured({"fp32": 3e11, "bf16": 2e12, "fp16": 2e11}, 0.7, 120.0, 0.2, 2.6e10, 0.6, 1e-6, 1.1e9, 1e-4, 2)


def test_the_file_is_a_machine(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(toml(FOUND))
    machine = load(str(path))
    assert machine.device.peak["bf16"] == 2e12
    assert machine.device.gemm.k_half == 120
    assert machine.node.bandwidth == pytest.approx(1.1e9)
    assert "tozan bench calibrate" in machine.sources["all"]


def test_this_machine_can_be_measured(tmp_path):
    found = calibrate(tmp_path / "here.toml", ranks=1, seconds=0.005, shrink=16)
    assert load(str(tmp_path / "here.toml")).device.peak["fp32"] > 1e8
    assert 0 < found.efficiency <= 1
    assert 0 < found.attention <= 1
    assert found.bandwidth > 1e8


def test_half_length_is_recovered_from_two_rates():
    rate = lambda k: 3e12 * k / (k + 150)  # noqa: E731
    assert _half_length(rate(2048), rate(64), 2048, 64) == pytest.approx(150)
    assert _half_length(1e12, 1e12, 2048, 64) == 0
