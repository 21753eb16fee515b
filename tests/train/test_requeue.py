"""A run that is started again: by Slurm after its warning, by torchrun after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import slurm
from tests.train.conftest import CONFIG

from tozan import checkpoint
from tozan.comm.jobs import Job, script
from tozan.config import load
from tozan.train import train

STEPS = 240
FLAGS = (f"--train.steps={STEPS}", "--eval.every=0", "--checkpoint.every=30")
TWO = ("--layout.data=2", "--train.accumulate=1")


def job(path: Path, **options) -> Job:
    return Job((sys.executable, "-m", "tozan", "train", str(path), *FLAGS, *TWO), ranks=2, name="again", **options)


def steps(run: Path) -> int:
    lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
    return max((json.loads(line)["step"] for line in lines[:-1] if '"step"' in line), default=0)


def wait_until(happened, seconds=240.0):
    end = time.monotonic() + seconds
    while not (found := happened()):
        assert time.monotonic() < end, f"nothing happened for {seconds:.0f} s"
        time.sleep(0.1)
    return found


def hash_of(run: Path) -> str:
    return checkpoint.state_hash(checkpoint.load(run / "checkpoints" / f"step-{STEPS:08d}").tensors)


def resumed(run: Path) -> list[int]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["step"] for record in records if record.get("event") == "resumed"]


@pytest.fixture(scope="module")
def calm(text_data, tmp_path_factory) -> str:
    """State hash of the undisturbed run, on one process."""
    folder = tmp_path_factory.mktemp("calm")
    (folder / "calm.toml").write_text(CONFIG.format(folder=folder / "calm", data=text_data))
    train(load(folder / "calm.toml", FLAGS))
    return hash_of(folder / "calm")


@pytest.mark.skipif(not slurm.installed(), reason="needs Slurm and munge, and root")
@pytest.mark.timeout(600)
def test_slurm_warns_requeues_and_the_run_ends_as_if_undisturbed(configure, calm, tmp_path):
    configure(*FLAGS, *TWO, folder="queued")
    run = tmp_path / "queued"
    (tmp_path / "job.sh").write_text(script(job(tmp_path / "queued.toml"), "slurm"))
    (tmp_path / "cluster").mkdir()
    with slurm.one_node(tmp_path / "cluster", cores=2) as environment:

        def call(*words: str) -> str:
            return subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True).stdout

        def state() -> str:
            return call("squeue", "-h", "-t", "all", "-j", number, "-o", "%T").strip()

        number = call("sbatch", "--parsable", "job.sh").strip()
        wait_until(lambda: steps(run) >= 40)
        call("scancel", "--signal=USR1", number)  # as Slurm does by itself before the time is up
        wait_until(lambda: state() == "PENDING")
        stopped = steps(run)
        assert 40 <= stopped < STEPS
        # Slurm lets a requeued job rest for two minutes; started in the same second, its batch script fails at once.
        call("scontrol", "update", f"JobId={number}", "StartTime=now+3")
        wait_until(lambda: state() in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"))
    output = (tmp_path / f"again-{number}.out").read_text()
    assert f"done: {STEPS} steps" in output, output
    assert resumed(run) == [stopped]
    assert hash_of(run) == calm


def children(process: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


@pytest.mark.timeout(600)
def test_torchrun_restarts_after_kill_9(configure, calm, tmp_path):
    configure(*FLAGS, *TWO, folder="torchrun")
    run, path = tmp_path / "torchrun", tmp_path / "torchrun.sh"
    path.write_text(script(job(tmp_path / "torchrun.toml", restarts=2), "torchrun"))
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with subprocess.Popen(["bash", path], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as agent:
        wait_until(lambda: steps(run) >= 80)
        os.kill(children(agent.pid)[-1], signal.SIGKILL)
        output, _ = agent.communicate(timeout=400)
    assert agent.returncode == 0, output.decode()
    assert resumed(run)[0] in range(30, STEPS, 30)
    assert hash_of(run) == calm
