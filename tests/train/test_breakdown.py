"""Every rank says where its time went: the phases are its wall time, whatever the layout."""

import itertools
import json
import time

import pytest
from ranks import spawn

from tozan.comm import Mesh
from tozan.comm.ledger import Ledger
from tozan.config import load
from tozan.train import fit
from tozan.train.clock import Clock
from tozan.train.run import assemble
from tozan.train.split import mesh_layout

STEPS = 4
LAYOUTS = {
    "pipeline": (["--layout.pipeline=2", "--layout.data=2", "--train.accumulate=4"], {"bubble", "wait/dp"}),
    "tensor": (["--layout.tensor=2", "--layout.data=2"], {"wait/dp", "wait/tp"}),
    "zero": (["--layout.data=4", "--layout.zero=3"], {"wait/dp"}),
}


def rank(path, flags):
    loaded = load(path, flags)
    mesh = Mesh.create(mesh_layout(loaded.config), timeout_s=60)
    run = assemble(loaded, mesh)
    begin = time.perf_counter()
    fit(run)
    ledger = {axis: (total.wait, total.transfer) for axis, total in mesh.ledger.by_axis.items()}
    return time.perf_counter() - begin, ledger


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_phases_are_the_wall_time_of_every_rank(name, configure, tmp_path):
    flags, expected = LAYOUTS[name]
    configure()
    base = [f"--train.steps={STEPS}", "--train.micro_batch=2", "--train.accumulate=2", "--eval.every=2"]
    told = spawn(4, rank, tmp_path / "run.toml", [*base, *flags])
    for number, (wall, ledger) in enumerate(told):
        file = tmp_path / "run" / "breakdown" / f"rank-{number:06d}.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
        for line in lines:
            assert sum(line["phases"].values()) == pytest.approx(line["seconds"], rel=1e-6)
            assert min(line["phases"].values()) >= -1e-9
            assert {"data", "forward", "backward", "optimizer", "other"} <= set(line["phases"])
        # What comes after the last record (evaluation, last checkpoint, closing) is all that the records do not hold.
        assert sum(line["seconds"] for line in lines) < wall
        seen = {phase for line in lines for phase in line["phases"]}
        assert expected <= seen
        for axis, (wait, _) in ledger.items():
            names = (f"wait/{axis}", "bubble") if axis == "pp" else (f"wait/{axis}",)
            assert sum(line["phases"].get(name, 0.0) for line in lines for name in names) <= wait + 1e-9
        assert {axis for line in lines for axis in line["transfer"]} <= set(ledger)
    check_timelines(tmp_path / "run", pipeline=name == "pipeline")


def check_timelines(run, pipeline):
    for number in range(4):
        found = json.loads((run / "timeline" / f"rank-{number:06d}.json").read_text())
        assert (found["step"], found["rank"]) == (2, number)
        spans = [(start, end) for _, start, end in found["phases"]]
        assert all(a[1] == pytest.approx(b[0]) for a, b in itertools.pairwise(spans)), "no gap between phases"
        assert found["collectives"]
        assert all(min(start, transfer, wait) >= 0 for *_, start, transfer, wait in found["collectives"])
        assert ("actions" in found) == pipeline
        if pipeline:
            kinds = [action[0] for action in found["actions"]]
            assert kinds.count("forward") == kinds.count("backward") == 4
            begin, end = found["pipeline"]
            assert all(begin <= start <= stop <= end for *_, start, stop in found["actions"])


def test_waits_are_taken_out_of_their_phase_and_charged_to_their_axis():
    ledger, begin = Ledger(), time.perf_counter()
    clock = Clock(ledger=ledger)
    entry = ledger.begin("all_reduce", "gradients", "dp", (0, 1), 8, time.perf_counter())
    time.sleep(0.03)
    entry.wait = 0.02
    ledger.end(entry)
    clock.mark("backward")
    passed = time.perf_counter() - begin
    entry = ledger.begin("all_gather", "state", "dp", (0, 1), 8, time.perf_counter())
    time.sleep(0.01)
    entry.wait = 0.01
    ledger.end(entry)
    clock.mark("checkpoint")
    seconds, phases = clock.lap()
    assert phases["wait/dp"] == pytest.approx(0.02)
    assert 0.01 <= phases["backward"] <= passed - 0.02
    assert phases["checkpoint"] >= 0.01, "what is not part of a step keeps its waits"
    assert sum(phases.values()) == pytest.approx(seconds)
