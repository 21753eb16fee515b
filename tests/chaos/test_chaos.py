"""The short version of the great test: 40 faults of all kinds over one run, and nothing is lost."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tozan.chaos import faults
from tozan.chaos.report import Report
from tozan.chaos.run import chaos


@given(st.integers(0, 2**32), st.integers(1, 500), st.integers(1, 4))
@settings(max_examples=50)
def test_a_script_depends_on_its_seed_alone_and_stays_inside_the_run(seed, count, ranks):
    steps = count * 40
    plan = faults.write(seed, count, steps, ranks, every=10)
    assert plan == faults.write(seed, count, steps, ranks, every=10)
    assert sorted(fault.number for fault in plan) == list(range(count))
    assert all(2 <= fault.step <= steps and 0 <= fault.rank < ranks for fault in plan)
    assert [fault.step for fault in plan] == sorted(fault.step for fault in plan)
    if count >= len(faults.KINDS):
        assert {fault.kind for fault in plan} == set(faults.KINDS)


def fault(number, kind, step):
    return faults.Fault(number, kind, step, 0, "forward", 1, 0.0, 0.5)


def test_losses_are_laid_to_the_fault_that_caused_them():
    plan = [fault(0, "kill", 5), fault(1, "pause", 6), fault(2, "no space", 8), fault(3, "stop", 20)]
    fired = {0: (1_000, 5), 1: (2_000, 6), 2: (3_000, 8), 3: (0, 0)}
    events = [
        {"event": "lost", "generation": 1, "at": 1_500},
        {"event": "resumed", "generation": 2, "at": 1_600, "lost": 1, "seconds": 0.2},
        {"event": "lost", "generation": 2, "at": 4_000},
        {"event": "resumed", "generation": 3, "at": 4_100, "lost": 2, "seconds": 0.3},
    ]
    report = Report.make(plan, fired, events, 100, (1.0, 2.0))
    assert [(o.detected, o.lost) for o in report.outcomes] == [(5e-7, 1), (None, 0), (1e-6, 2), (None, 0)]
    assert report.lost == 3
    assert report.useful == 100 / 103
    assert report.differences == ["fault 3 (stop) did not happen", "fault 2 (no space) in step 8 cost 2 steps"]
    assert not report.passed
    assert "FAILED" in report.table()


def test_a_fault_without_a_loss_does_not_take_the_next_one_on_itself():
    plan = [fault(0, "truncated checkpoint", 3), fault(1, "kill", 5), fault(2, "flipped weight bit", 9)]
    fired = {0: (1_000, 3), 1: (2_000, 5), 2: (3_000, 9)}
    events = [
        {"event": "lost", "generation": 1, "at": 2_500},
        {"event": "resumed", "generation": 2, "at": 2_600, "lost": 1, "seconds": 0.2},
        {"event": "lost", "generation": 2, "at": 3_500},  # the flipped bit ended its process
        {"event": "resumed", "generation": 3, "at": 3_600, "lost": 1, "seconds": 0.2},
    ]
    report = Report.make(plan, fired, events, 1000, (1.0, 2.0))
    assert [(o.detected, o.lost) for o in report.outcomes] == [(None, 0), (5e-7, 1), (5e-7, 1)]
    assert report.lost == 2
    assert report.passed


@pytest.mark.timeout(1500)
def test_forty_faults_of_all_kinds_change_no_bit(tmp_path):
    report = chaos(tmp_path / "chaos", 40, 1, None, [], print)
    assert report.passed, report.table() + (tmp_path / "chaos" / "hurt.log").read_text()[-5000:]
    assert set(Counter(o.kind for o in report.outcomes)) == set(faults.KINDS)
    assert report.generations > 20
    assert json.loads((tmp_path / "chaos" / "report.json").read_text())["passed"] is True
