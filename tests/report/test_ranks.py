"""What every rank wrote, read back: who is slow, where the pipeline stands still, and the trace of all of them."""

import json

import numpy as np
import pytest
from made_ranks import MICROBATCHES, STAGES, add_ranks
from made_run import make_run

from tozan import schedules
from tozan.errors import UserError
from tozan.report import history, ranks, run_page, trace
from tozan.report.figures import pipeline


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return add_ranks(make_run(tmp_path_factory.mktemp("ranks") / "run", 60), 64, 60)


def test_means_are_those_of_the_newest_records(run):
    found = ranks.read(run)
    lines = [json.loads(line) for line in (run / "breakdown" / "rank-000005.jsonl").read_text().splitlines()]
    expected = np.mean([line["phases"]["backward"] for line in lines])
    assert found.seconds[5, found.phases.index("backward")] == pytest.approx(expected)
    assert found.seconds.sum(1) == pytest.approx(found.wall)
    assert found.records == 60
    assert ranks.read(run, since=50).records == 10
    assert ranks.read(run, ranks=8).ranks.tolist() == list(range(8))
    assert found.phases.index("forward") < found.phases.index("wait/dp") < found.phases.index("optimizer")


def test_the_slow_rank_is_named_and_no_other(run):
    (one,) = ranks.slow(ranks.read(run), STAGES)
    assert (one.rank, one.phase) == (37, "backward")
    assert one.times == pytest.approx(1.35, abs=0.05)
    page = run_page.page(run)
    assert any("rank 37" in line for line in page.advice)
    (event,) = (event for event in page.events if event.event == "slow rank")
    assert event.text.startswith("rank 37: its own work takes 1.3")


@pytest.mark.parametrize("peers", [1, 2, 12])
def test_even_ranks_are_not_slow(tmp_path, peers):
    found = ranks.read(add_ranks(make_run(tmp_path / "run", 20), 4 * peers, 20, slow=None))
    assert ranks.slow(found, STAGES) == []


def test_a_long_file_is_read_from_its_end(tmp_path):
    (tmp_path / "breakdown").mkdir()
    phases = {"forward": 0.5, "backward": 0.5}
    lines = [json.dumps({"step": n, "seconds": 1.0, "phases": phases, "transfer": {}}) for n in range(1, 20_001)]
    (tmp_path / "breakdown" / "rank-000000.jsonl").write_text("\n".join(lines) + '\n{"step": 20')
    assert ranks.read(tmp_path).records == ranks.NEWEST


def test_the_measured_pipeline_is_laid_out_as_it_ran(run):
    found = ranks.timeline(run)
    schedule = schedules.create("1f1b", STAGES, MICROBATCHES)
    steps = pipeline.measured_steps(found, schedule)
    assert len(steps) == 2 * STAGES * MICROBATCHES
    at = {(step.stage, step.action): step for step in steps}
    for step in steps:
        need = schedule.waits_for(step.stage, step.action)
        if need:
            assert step.start >= at[need].end - 1e-9, "what arrives was sent before, on the common clock"
    plan = pipeline.planned_steps(steps, schedule)
    ideal = schedules.bubble("1f1b", STAGES, 1, 0.02, 0.036)
    assert max(step.end for step in plan) == pytest.approx(MICROBATCHES * 0.056 + ideal)
    assert pipeline.idle(steps, STAGES) > pipeline.idle(plan, STAGES)


def overlapping(spans):
    """Pairs of complete events of one track that neither nest nor follow each other: readers drop or misplace them."""
    found, tracks = [], {}
    for event in sorted(spans, key=lambda e: (e["ts"], -e["dur"])):
        open_ones = tracks.setdefault((event["pid"], event["tid"]), [])
        while open_ones and open_ones[-1]["ts"] + open_ones[-1]["dur"] <= event["ts"]:
            open_ones.pop()
        if open_ones and event["ts"] + event["dur"] > open_ones[-1]["ts"] + open_ones[-1]["dur"]:
            found.append((open_ones[-1]["name"], event["name"]))
        open_ones.append(event)
    return found


def test_the_trace_is_in_the_format_that_perfetto_opens(run, tmp_path):
    """Trace Event Format, JSON object form: complete events ("X") nest within a track, metadata ("M") names tracks."""
    found = json.loads(trace.write(run, tmp_path / "trace.json").read_text())
    spans = [event for event in found["traceEvents"] if event["ph"] == "X"]
    named = {(e["pid"], e.get("tid")) for e in found["traceEvents"] if e["ph"] == "M" and e["name"] == "thread_name"}
    assert {event["ph"] for event in found["traceEvents"]} == {"X", "M"}
    assert {event["pid"] for event in spans} == set(range(64))
    for event in spans:
        assert isinstance(event["name"], str)
        assert isinstance(event["ts"], int), "fractions do not add up where they should"
        assert event["ts"] >= 0
        assert event["dur"] >= 0
        assert (event["pid"], event["tid"]) in named
    assert overlapping(spans) == []
    records = [e for e in spans if e["pid"] == 3 and e["cat"] == "records"]
    steps = [e for e in records if e["name"].startswith("step ")]
    assert len(steps) == trace.NEWEST
    inner = sum(e["dur"] for e in records) - sum(e["dur"] for e in steps)
    assert inner == sum(e["dur"] for e in steps), "phases fill their step"


def test_a_run_without_a_breakdown_has_no_trace(tmp_path):
    with pytest.raises(UserError, match="no breakdown"):
        trace.write(make_run(tmp_path / "run", 20), tmp_path / "trace.json")


def test_a_resumed_run_counts_since_then(run):
    found = history.read(run)
    resumed = max(event.step for event in found.events if event.event == "resumed")
    assert run_page.everyone(found).records == 60 - resumed
