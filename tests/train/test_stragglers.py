"""Slow ranks: named within 20 steps, with few false alarms, under noise that runs really have."""

import contextlib
import io
import json
import time
from pathlib import Path

import numpy as np
import pytest
from ranks import spawn

from tozan.comm import Mesh
from tozan.config import load
from tozan.train import fit
from tozan.train.outliers import Outliers
from tozan.train.run import assemble
from tozan.train.split import mesh_layout
from tozan.train.stragglers import LEARN, SKIP, WINDOW, Stragglers, _above_others

LIMIT = 0.075
"""The default of `checks.slow`."""


def made(seed: int, slow: bool):
    """Seconds per step of a made cluster, (steps, ranks), with the stage of each rank; and who is slow since when.

    Stages differ by up to 30%, ranks by 1%; each step has up to 5% of noise of its own on every rank, 3% of all steps
    of a rank are up to several times as long, and all ranks together drift, and stumble in 2% of the steps.
    """
    chance = np.random.default_rng(seed)
    world, stages = int(chance.choice([2, 4, 8, 16, 64])), int(chance.choice([1, 1, 2, 4]))
    stages = min(stages, world)
    roles = np.repeat(np.arange(stages), world // stages)
    usual = np.repeat(1 + 0.3 * chance.random(stages), world // stages) * (1 + 0.01 * chance.standard_normal(world))
    steps, noise = 120, chance.uniform(0.01, 0.05)
    onset = int(chance.integers(25 if world > stages else SKIP + LEARN + WINDOW, 90))
    who, amount = int(chance.integers(world)), chance.uniform(0.1, 0.5)
    drift, rows = 0.0, []
    for step in range(steps):
        drift = 0.8 * drift + 0.05 * chance.standard_normal()
        row = usual * np.exp(drift + noise * chance.standard_normal(world))
        row = row * np.where(chance.random(world) < 0.03, 1 + chance.exponential(0.5, world), 1)
        row = row * (1 + chance.exponential(1.0) if chance.random() < 0.02 else 1)
        row[who] *= 1 + amount if slow and step >= onset else 1
        rows.append(row)
    return roles.tolist(), np.array(rows), onset, who, amount


def test_slow_ranks_are_named_within_20_steps_with_precision_and_recall_of_95_percent():
    """200 clusters of 2 to 64 ranks, half of them with one rank that becomes 10 to 50% slower."""
    right = wrong = missed = 0
    late, far = [], []
    for seed in range(200):
        roles, rows, onset, who, amount = made(seed, slow=seed % 2 == 0)
        detector, hit = Stragglers(roles, LIMIT), False
        for step, row in enumerate(rows):
            for found in detector.update(step, row.tolist()):
                if seed % 2 == 0 and found.rank == who and onset <= step:
                    hit = hit or step < onset + 20
                    late.append(found.since - onset)
                    far.append(found.excess - amount)
                elif not found.over:
                    wrong += 1
        right, missed = right + hit, missed + (seed % 2 == 0 and not hit)
    assert right / (right + missed) >= 0.95
    assert right / (right + wrong) >= 0.95
    assert np.median(np.abs(late)) <= 1
    assert np.median(np.abs(far)) <= 0.05


def test_a_rank_that_recovers_is_said_to():
    detector, said = Stragglers([0, 0, 0, 0], LIMIT), []
    chance = np.random.default_rng(0)
    for step in range(150):
        row = 1 + 0.01 * chance.standard_normal(4)
        row[2] *= 1.3 if 40 <= step < 80 else 1.0
        said += detector.update(step, row.tolist())
    assert [(slow.rank, slow.over) for slow in said] == [(2, False), (2, True)]
    assert said[0].since == 40
    assert said[0].excess == pytest.approx(0.3, abs=0.03)
    assert "% slower than its equals since step 40" in str(said[0])


def test_each_against_the_median_of_the_others():
    values = np.random.default_rng(1).standard_normal((40, 9))
    for size in range(2, 10):
        for row in values[:, :size]:
            expected = [row[i] - np.median(np.delete(row, i)) for i in range(size)]
            np.testing.assert_allclose(_above_others(row), expected)


CONFIG = """
version = 1
[run]
folder = "{folder}"
[model]
layers = 2
width = 32
heads = 4
vocabulary = 384
sequence = 16
[data]
path = "{data}"
[layout]
data = 4
[train]
steps = 60
global_batch = 8
micro_batch = 2
precision = "fp32"
[optim]
lr = 1e-3
"""


def with_a_busy_rank(path: Path) -> str:
    loaded = load(path)
    run = assemble(loaded, Mesh.create(mesh_layout(loaded.config), timeout_s=60))
    samples = run.data.samples

    def slowly(number, count):
        """Rank 2 has other things to do from step 25 on; all take long, so that a loaded machine matters less."""
        time.sleep(0.06)
        until = time.perf_counter() + (0.05 if run.split.mesh.rank == 2 and run.step >= 25 else 0.0)
        while time.perf_counter() < until:
            pass
        return samples(number, count)

    run.data.samples = slowly
    with contextlib.redirect_stderr(io.StringIO()) as said:
        fit(run)
    return said.getvalue()


def test_a_real_rank_that_is_busy_with_something_else_is_named(text_data, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(CONFIG.format(folder=tmp_path / "run", data=text_data))
    said = spawn(4, with_a_busy_rank, path, timeout=120)
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    found = [record for record in lines if record.get("event") == "slow rank"]
    assert [record["text"].split(" is ")[0] for record in found] == ["rank 2"]
    assert 25 < found[0]["step"] <= 46
    assert "tozan: slow rank: rank 2 is" in said[0]
    assert said[1:] == [""] * 3


def test_outliers_are_judged_robustly_and_not_before_there_is_something_to_compare_with():
    chance = np.random.default_rng(0)
    outliers = Outliers(10.0)
    for step in range(2000):
        loss = 8 * np.exp(-step / 300) + 2 + 0.05 * chance.standard_normal()
        norm = np.exp(0.3 * chance.standard_normal())
        assert outliers.judge(loss, norm) is None
        outliers.record(loss, norm)
    for _ in range(20):  # some odd steps in the window change nothing
        assert "loss" in outliers.judge(5.0, 1.0)
        outliers.record(5.0, 1.0)
    assert "grad_norm" in outliers.judge(2.0, 1e4)
    assert outliers.judge(float("nan"), 1.0)
    assert outliers.judge(2.0, 1.0) is None
    outliers.forget()
    assert outliers.judge(100.0, 1e6) is None
