"""The short versions of the great test: faults of all kinds over one run, and nothing is lost."""

from __future__ import annotations

import errno
import json
import os
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tozan.chaos import faults, hosts
from tozan.chaos.disk import mounted
from tozan.chaos.report import Report
from tozan.chaos.run import chaos, read_events


@given(st.integers(0, 2**32), st.integers(1, 500), st.integers(1, 4), st.booleans(), st.booleans())
@settings(max_examples=50)
def test_a_script_depends_on_its_seed_alone_and_stays_inside_the_run(seed, count, ranks, network, disk):
    steps = count * 40
    kinds = faults.NETWORK | faults.KINDS if network else faults.KINDS
    plan = faults.write(seed, count, steps, ranks, 10, kinds, disk)
    assert plan == faults.write(seed, count, steps, ranks, 10, kinds, disk)
    assert sorted(fault.number for fault in plan) == list(range(count))
    assert all(2 <= fault.step <= steps and 0 <= fault.rank < ranks for fault in plan)
    assert [fault.step for fault in plan] == sorted(fault.step for fault in plan)
    if count >= len(kinds):
        assert {fault.kind for fault in plan} == set(kinds)


def fault(number, kind, step):
    return faults.Fault(number, kind, step, 0, "forward", 1, 0.0, 0.5)


def test_losses_are_laid_to_the_fault_that_caused_them():
    plan = [fault(0, "kill", 5), fault(1, "pause", 6), fault(2, "no space", 8), fault(3, "stop", 20)]
    fired = {0: (1_000, 5), 1: (2_000, 6), 2: (3_000, 8), 3: (0, 0)}
    events = [
        {"event": "lost", "generation": 1, "at": 1_500, "what": "rank 0"},
        {"event": "resumed", "generation": 2, "at": 1_600, "lost": 1, "seconds": 0.2},
        {"event": "lost", "generation": 2, "at": 4_000, "what": "rank 0"},
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
        {"event": "lost", "generation": 1, "at": 2_500, "what": "rank 0"},
        {"event": "resumed", "generation": 2, "at": 2_600, "lost": 1, "seconds": 0.2},
        {"event": "lost", "generation": 2, "at": 3_500, "what": "rank 0"},  # the flipped bit ended its process
        {"event": "resumed", "generation": 3, "at": 3_600, "lost": 1, "seconds": 0.2},
    ]
    report = Report.make(plan, fired, events, 1000, (1.0, 2.0))
    assert [(o.detected, o.lost) for o in report.outcomes] == [(None, 0), (5e-7, 1), (5e-7, 1)]
    assert report.lost == 2
    assert report.passed


def test_what_ends_by_itself_and_a_node_that_comes_take_no_loss_on_themselves():
    plan = [fault(0, "cable out", 3), fault(1, "slow link", 9)]
    events = [
        {"event": "lost", "generation": 1, "at": 6_000_001_000, "what": "node 1 is gone"},
        {"event": "resumed", "generation": 3, "at": 7, "lost": 5, "seconds": 1.5},
        {"event": "grows", "generation": 3, "at": 9},
        {"event": "resumed", "generation": 4, "at": 10, "lost": 0, "seconds": 0.5},
    ]
    report = Report.make(plan, {0: (1_000, 3), 1: (8, 9)}, events, 1000, (1.0, 2.0))
    cable, link = report.outcomes
    assert (cable.detected, cable.lost, cable.recovery, cable.noticed) == (6.0, 5, 1.5, "node 1 is gone")
    assert (link.detected, link.lost, link.recovery, link.noticed) == (None, 0, None, "")
    assert report.passed
    assert "node 1 is gone" in report.table()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount")
def test_a_disk_is_full_read_only_or_gone_and_leaves_its_files_at_the_end(tmp_path):
    def write(name, size=1):
        try:
            (tmp_path / "here" / name).write_bytes(bytes(size))
        except OSError as error:
            return error.errno
        return 0

    with mounted(tmp_path / "here") as disk:
        assert write("first") == 0
        disk.fill(left=1 << 16)
        assert write("large", 1 << 18) == errno.ENOSPC
        disk.empty()
        assert write("large", 1 << 18) == 0
        disk.read_only(True)
        assert write("more") == errno.EROFS
        disk.read_only(False)
        disk.lose()
        assert not list((tmp_path / "here").iterdir())
        assert write("last") == 0
    assert not os.path.ismount(tmp_path / "here")
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["last"]


def test_the_kill_before_a_disturbed_restart_belongs_to_it():
    plan = [fault(0, "kill", 3), fault(1, "kill in a restart", 9)]
    fired = {0: (1_000, 3), 1: (3_000, 9)}
    events = [
        {"event": "lost", "generation": 1, "at": 1_500, "what": "rank 0"},
        {"event": "resumed", "generation": 2, "at": 1_600, "lost": 1, "seconds": 0.2},
        {"event": "lost", "generation": 2, "at": 2_500, "what": "rank 0"},  # so that there is a restart
        {"event": "resumed", "generation": 3, "at": 2_900, "lost": 1, "seconds": 0.2},
        {"event": "lost", "generation": 3, "at": 3_500, "what": "rank 0"},
        {"event": "resumed", "generation": 4, "at": 3_600, "lost": 1, "seconds": 0.2},
    ]
    report = Report.make(plan, fired, events, 1000, (1.0, 2.0))
    assert [(o.detected, o.lost) for o in report.outcomes] == [(5e-7, 1), (5e-7, 2)]
    assert report.passed


@pytest.mark.timeout(1500)
def test_faults_of_all_kinds_change_no_bit_and_97_percent_of_the_steps_are_useful(tmp_path):
    """With fewer steps between faults than usual, and more checkpoints for that which loses the copies in memory."""
    report = chaos(tmp_path / "chaos", 24, 1, 1_050, 1, ["--checkpoint.every=4"], print)
    said = report.table() + (tmp_path / "chaos" / "hurt.log").read_text()[-5000:]
    assert report.passed, said
    assert report.useful >= 0.97, said
    assert set(Counter(o.kind for o in report.outcomes)) == set(faults.KINDS)
    assert report.generations > 10
    assert json.loads((tmp_path / "chaos" / "report.json").read_text())["lost"] == report.lost


@pytest.mark.skipif(not hosts.available(), reason="needs root and iproute2")
@pytest.mark.timeout(600)
def test_two_hosts_whose_network_fails_end_with_the_same_bits(tmp_path):
    report = chaos(tmp_path / "chaos", 8, 1, 300, 2, [], print)
    assert report.passed, report.table() + (tmp_path / "chaos" / "hurt.log").read_text()[-5000:]
    outcomes = {o.kind: o for o in report.outcomes}
    assert set(outcomes) == set(faults.NETWORK)
    assert all(outcomes[kind].noticed for kind in faults.NODE_LOST)  # by the agents, or by a rank before them
    layouts = [
        e["ranks"] for e in read_events(tmp_path / "chaos" / "hurt" / "recovery.jsonl") if e["event"] == "layout"
    ]
    assert layouts == [1, 2] * len(faults.NODE_LOST)
    assert not any(outcomes[kind].noticed for kind in faults.HARMLESS & set(outcomes))
    assert outcomes["rank's connections reset"].noticed
    assert outcomes["agents' connection reset"].noticed
