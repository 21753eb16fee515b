"""Collectives, files and scaling: counts that are exact, rows that are complete, at sizes that take seconds."""

import json
import os
import subprocess
import sys

import pytest

from tozan.bench import collectives, io, scaling
from tozan.bench.result import read
from tozan.cli import main


def narrow(text):
    return all(len(line) <= 100 for line in text.splitlines())


def test_collectives_between_local_processes(tmp_path, capsys):
    out = tmp_path / "collectives.json"
    words = ["bench", "collectives", "--kilobytes", "1,8", "--repeats", "2", "--dtypes", "fp32,bf16"]
    assert main([*words, "--out", str(out)]) == 0
    assert narrow(capsys.readouterr().out)
    found = read(out)
    assert {row["operation"] for row in found.rows} == set(collectives.FACTORS)
    assert {row["ranks"] for row in found.rows} == {2}
    for row in found.rows:
        if row["latency"]:
            assert row.unit == "s"
            assert row["bytes"] <= 8
            continue
        assert row["bytes"] in (1 << 10, 8 << 10)
        assert row["algorithm_bandwidth"] == pytest.approx(row["bytes"] / row["seconds"])
        factor = {"all_reduce": 1.0, "broadcast": 1.0, "shift": 1.0}.get(row["operation"], 0.5)
        assert row["bus_bandwidth"] == pytest.approx(factor * row["algorithm_bandwidth"])


@pytest.mark.parametrize(("operation", "ranks", "factor"), [("all_reduce", 4, 1.5), ("all_gather", 4, 0.75)])
def test_factors_are_those_of_the_ledger(operation, ranks, factor):
    """What the ledger counts as sent by all ranks, over B for each rank: the bytes a rank sends by its formula."""
    assert collectives.FACTORS[operation](ranks) == factor


def test_collectives_under_a_launcher(tmp_path):
    out = tmp_path / "job.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "tozan"]
    words = ["bench", "collectives", "--kilobytes", "1", "--repeats", "2", "--dtypes", "fp32", "--ranks", "7"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *words, "--out", str(out)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("bus bandwidth over torchrun") == 1, "rank 0 alone prints"
    assert {row["ranks"] for row in read(out).rows} == {2}


def test_io_counts_exactly(tmp_path, capsys):
    out = tmp_path / "io.json"
    words = ["bench", "io", "--documents", "300", "--bytes", "200", "--samples", "12", "--passes", "2"]
    assert main([*words, "--folder", str(tmp_path), "--out", str(out)]) == 0
    assert narrow(capsys.readouterr().out)
    found = read(out)
    loose, shards = found.row("one file each, warm"), found.row("tar shards, index, warm")
    assert loose["opens"] == 300
    assert loose["inodes"] == 300 + 2, "with the two folders"
    assert shards["opens"] == 2, "one shard and its index"
    assert shards["inodes"] < 10
    assert shards.repeats == 2
    assert found.row("tar shards, index, cold").repeats == 1
    assert 0 < loose["p50_seconds"] <= loose["p99_seconds"]
    assert [path.name for path in tmp_path.iterdir()] == ["io.json"], "nothing stays behind"
    assert io.used(tmp_path)[0] == 2


SMALL = ["--model.layers=1", "--model.width=32", "--model.heads=2", "--model.sequence=32", "--model.vocabulary=4096"]


def test_scaling_runs_real_jobs(tmp_path, capsys):
    out = tmp_path / "scaling.json"
    words = ["bench", "scaling", "--model", "gpt2-tiny", "--ranks", "1,2", "--global-batch", "4", "--steps", "3"]
    words += [*SMALL, "--machine", "xeon-amx", "--out", str(out)]
    assert main(words) == 0
    assert narrow(capsys.readouterr().out)
    one, two = read(out).rows
    assert (one["ranks"], two["ranks"]) == (1, 2)
    assert two["layout"]["data"] == 2
    assert two["global_batch"] == 4
    assert one.repeats == 2, "steps but the first"
    assert one["efficiency"] == 1
    for row in (one, two):
        assert row["tokens_per_second"] == pytest.approx(4 * 32 / row["seconds"])
        assert {"forward", "backward", "optimizer"} <= set(row["phases"])
        assert 0 < row["predicted_seconds"] < 60
    assert json.loads(out.read_text())["options"]["machine"] == "xeon-amx"


def test_the_talks_setups():
    talk = scaling.SETUPS["talk-124m"]
    for ranks in talk.ranks:
        assert talk.batch(ranks) == 1024
        assert talk.batch(ranks) // ranks // talk.micro_batch == 1024 // ranks, "accumulation"
    weak = scaling.SETUPS["talk-124m-weak"]
    assert [weak.batch(ranks) for ranks in (1, 4)] == [1, 4]
    assert scaling.SETUPS["talk-1.3b"].axis == "tensor"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["scaling", "--setup", "talk"], "talk-124m"),
        (["scaling", "--ranks", "3", "--global-batch", "4", "--data", "x"], "do not divide into 3 replicas"),
        (["collectives", "--operations", "all_gossip"], "all_gossip"),
        (["scaling", "--ranks", "1", "--data", "x", "--train.stepz", "1"], "did you mean"),
    ],
)
def test_mistakes_are_said_before_anything_runs(words, said, capsys):
    assert main(["bench", *words]) == 2
    assert said in capsys.readouterr().err
