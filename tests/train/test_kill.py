"""A run killed with SIGKILL 20 times, mid-step and mid-save, ends bit-equal to one that was left in peace."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tozan import checkpoint

STEPS = 120


class Server:
    """Forks processes that run `tozan train`."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("fork_server.py")
        self._process = subprocess.Popen(
            [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, *words: str) -> int:
        self._process.stdin.write(json.dumps(words) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def status(self) -> int:
        """Wait for the process last started."""
        return int(self._process.stdout.readline())

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()


@pytest.fixture(scope="module")
def server():
    with contextlib.closing(Server()) as it:
        yield it


def records(run: Path, kind: str) -> list[dict]:
    """All whole records; a kill may have torn lines."""
    found = []
    for line in (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return [record for record in found if record["kind"] == kind]


def lines(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def staged(run: Path) -> list[Path]:
    return list((run / "checkpoints").glob(".saving-*"))


def wait_until(happened, process: int) -> None:
    """Poll without sleeping long: a save of a tiny model takes a few milliseconds."""
    end = time.monotonic() + 100
    while not happened():
        assert time.monotonic() < end, "nothing happened for 100 s"
        os.kill(process, 0)
        time.sleep(0.0005)


def kill(process: int, run: Path, aim: str, chance: random.Random) -> None:
    """SIGKILL at a random moment of the training, or while a checkpoint is being written."""
    enough = lines(run) + chance.randint(1, 10)
    wait_until(lambda: lines(run) >= enough, process)
    if aim == "save":
        leftovers = set(staged(run))
        wait_until(lambda: set(staged(run)) - leftovers, process)
        time.sleep(chance.uniform(0, 0.002))
    else:
        time.sleep(chance.uniform(0, 0.05))
    os.kill(process, signal.SIGKILL)


@pytest.mark.timeout(600)
def test_killed_20_times_equals_undisturbed_to_the_bit(configure, tmp_path, server):
    flags = ["--checkpoint.every=2", f"--train.steps={STEPS}", "--eval.every=0", "--model.dropout=0.1"]
    calm, hurt = (configure(*flags, folder=name).config.run.folder for name in ("calm", "hurt"))
    calm, hurt = Path(calm), Path(hurt)
    server.start("train", str(tmp_path / "calm.toml"), *flags)
    assert server.status() == 0

    words, chance, torn_saves = ["train", str(tmp_path / "hurt.toml"), *flags], random.Random(20), 0
    for attempt in range(20):
        aim = "save" if attempt % 2 else "step"
        if attempt == 9:  # by the command line; the others are forked, which is quicker
            with subprocess.Popen([sys.executable, "-m", "tozan", *words], stdout=subprocess.DEVNULL) as process:
                kill(process.pid, hurt, aim, chance)
            assert process.returncode == -signal.SIGKILL
        else:
            kill(server.start(*words), hurt, aim, chance)
            assert os.WTERMSIG(server.status()) == signal.SIGKILL
        torn_saves += bool(staged(hurt))
    assert torn_saves >= 3, "too few of the kills fell into a save"
    server.start(*words)
    assert server.status() == 0

    assert not staged(hurt)
    ends = [checkpoint.load(run / "checkpoints" / f"step-{STEPS:08d}") for run in (calm, hurt)]
    assert checkpoint.state_hash(ends[0].tensors) == checkpoint.state_hash(ends[1].tensors)
    assert ends[0].meta == ends[1].meta
    assert ends[0].meta["samples"] == STEPS * 4
    peaceful, resumed = ({r["step"]: r for r in records(run, "step")} for run in (calm, hurt))
    assert peaceful.keys() == resumed.keys() == set(range(1, STEPS + 1))
    for step, record in peaceful.items():
        for field in ("loss", "grad_norm", "lr", "tokens", "skipped"):
            assert record[field] == resumed[step][field]
    assert len([e for e in records(hurt, "event") if e["event"] == "resumed"]) >= 15
