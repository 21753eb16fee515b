"""A process that hangs outside of collectives ends itself and says where; one that is only slow does not."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tozan.comm.ledger import Ledger
from tozan.errors import EXIT_LOST
from tozan.train import train
from tozan.train.clock import Clock
from tozan.train.deadline import FACTOR, Deadline

PHASES = ("data", "forward", "backward", "optimizer")


class Watch:
    """A deadline whose thread looks only when it is told to: once for each of its seconds."""

    def __init__(self, seconds: float | None, least: float = 100.0) -> None:
        self.ledger, self.clock, self.ended, self.step = Ledger(), Clock(), False, 0
        self._looking = ThreadPoolExecutor(1)  # what it reads itself is no sign of progress
        self._looking.submit(int).result()
        self.deadline = Deadline(0, self.ledger, None, seconds, least, end=lambda: None)
        self.deadline._thread.start = lambda: None
        self.deadline.__enter__()
        self.deadline._interval = 1.0

    def pass_by(self, seconds: int) -> int:
        """How many of these seconds go by before the process would end."""
        look = self.deadline._look
        return self._looking.submit(lambda: next((second for second in range(seconds) if look()), seconds)).result()

    def begin(self) -> None:
        self.step += 1
        self.deadline.begin(self.step, self.clock)

    def take_step(self, seconds: int = 0) -> None:
        self.begin()
        for phase in PHASES:
            assert self.pass_by(seconds) == seconds
            self.clock.mark(phase)


def test_a_step_may_stand_still_for_the_timeout_or_ten_times_what_steps_did_before():
    watch = Watch(None)
    for _ in range(3):
        watch.take_step()
    watch.begin()
    assert watch.pass_by(10_000) in (101, 102)
    watch = Watch(None)
    watch.take_step()
    watch.take_step(60)
    watch.begin()
    assert watch.pass_by(10_000) in range(FACTOR * 58, FACTOR * 60 + 2)


def test_phases_that_are_long_by_right_do_not_end_a_run():
    watch = Watch(5.0)
    watch.begin()
    assert watch.pass_by(10_000) in (51, 52)  # the first step, which may compile
    for _ in range(2):
        watch.take_step()
    watch.begin()
    with watch.deadline.during("evaluation"):
        assert watch.pass_by(5_000) == 5_000  # nobody knows yet how long it takes
    with watch.deadline.during("evaluation"):
        assert watch.pass_by(49) == 49
    assert watch.pass_by(100) in (6, 7)  # and the step goes on as before
    entry = watch.ledger.begin("all_reduce", "gradients", "dp", (0, 1), 8, 0.0)
    assert watch.pass_by(1_000) == 1_000  # who waits for others is the heartbeat's business
    watch.ledger.end(entry)
    assert watch.pass_by(100) in (6, 7)
    assert Watch(0.0).deadline._thread.is_alive() is False


def test_says_step_and_phase_as_the_step_before_had_them():
    watch = Watch(5.0)
    watch.take_step()
    assert watch.deadline.whereabouts().startswith("step 1, after optimizer, at ")
    watch.begin()
    said = []
    for phase in PHASES:
        said.append(watch.deadline.whereabouts().split(", at ")[0])
        watch.clock.mark(phase)
    assert said == [f"step 2, {phase}" for phase in PHASES]
    with watch.deadline.during("checkpoint"):
        assert watch.deadline.whereabouts().startswith("checkpoint after step 2, at train/deadline.py:")


def test_a_start_or_a_save_shows_progress_by_the_bytes_that_it_moves():
    watch = Watch(5.0, least=7.0)
    assert watch.deadline.whereabouts().startswith("start, at ")
    assert watch.pass_by(1_000) in (71, 72)  # ten times the timeout, which is more than the deadline
    for kind in ("checkpoint", "going back"):
        with watch.deadline.during(kind):
            assert watch.pass_by(1_000) in (71, 72)
    for _ in range(10):  # as a file is read that takes long
        assert watch.pass_by(50) == 50
        Path(__file__).read_bytes()
    with watch.deadline.ends():
        watch.take_step()
    assert watch.deadline.whereabouts().startswith("last checkpoint after step 1, at ")
    assert watch.pass_by(1_000) in (71, 72)
    watch.ledger.listening = True  # for the other ranks' parts
    assert watch.pass_by(100) == 100


@pytest.mark.parametrize("where", ["start", "last checkpoint"])
def test_a_run_that_hangs_in_its_start_or_its_last_checkpoint_ends(configure, monkeypatch, capfd, where):
    """The end of the process is played by an exception in the thread that stands still."""
    over = threading.Event()

    def stuck(*_arguments, **_options):
        assert over.wait(30)
        raise TimeoutError("ended")

    monkeypatch.setitem(Deadline.__init__.__kwdefaults__, "end", over.set)
    monkeypatch.setattr("tozan.train.deadline.FACTOR", 0.2)
    if where == "start":
        monkeypatch.setattr("tozan.train.run.open_data", stuck)
    else:
        monkeypatch.setattr("tozan.checkpoint.saver.write", stuck)
    few = ("--eval.every=0", "--train.steps=3", "--train.kernels=plain")
    with pytest.raises(TimeoutError, match="ended"):
        train(configure("--layout.timeout=5", "--recovery.deadline=5", *few))
    said = capfd.readouterr().err
    place = ", at train/run.py:" if where == "start" else " after step 3, at checkpoint/saver.py:"
    assert f"tozan: rank 0 stands still: {where}{place}" in said, said
    assert re.search(r", for [12] s \(since ", said)


HANGS = """
import os
from pathlib import Path
from tozan.data.dataset import Dataset
samples, count, marker = Dataset.samples, 0, Path(os.environ["MARKER"])
def stuck(*arguments):
    global count
    count += 1
    if count > 6 and os.environ.get("RANK", "1") == "1" and not marker.exists():
        marker.touch()
        while True:
            pass
    return samples(*arguments)
Dataset.samples = stuck
"""


def run(tmp_path: Path, verb: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """A run whose reader of data loops without end in step 4, once."""
    (tmp_path / "sitecustomize.py").write_text(HANGS)
    words = [sys.executable, "-m", "tozan", verb, str(tmp_path / "run.toml"), "--recovery.deadline=1", *flags]
    variables = {"PYTHONPATH": str(tmp_path), "MARKER": str(tmp_path / "hung"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, env=os.environ | variables, capture_output=True, text=True, timeout=240)


def check_message(errors: str, rank: int) -> None:
    said = [line for line in errors.splitlines() if "stands still" in line]
    assert len(said) == 1, errors
    pattern = (
        rf"tozan: rank {rank} stands still: step 4, data, at train/step.py:\d+ in own_micro_batches → "
        r".*/sitecustomize.py:1\d in stuck, for [12] s \(since \d\d:\d\d:\d\d UTC\)\."
    )
    assert re.fullmatch(pattern, said[0]), said[0]
    assert "Traceback" not in errors


def test_an_endless_loop_in_the_reader_ends_a_run_of_one_process(configure, tmp_path):
    configure()
    done = run(tmp_path, "train")
    assert done.returncode == EXIT_LOST, done.stderr
    check_message(done.stderr, 0)


def test_an_agent_starts_a_run_again_whose_second_rank_hung(configure, tmp_path):
    configure()
    done = run(tmp_path, "agent", "--layout.data=2", "--train.accumulate=2", "--train.micro_batch=1")
    assert done.returncode == 0, done.stderr
    check_message(done.stderr, 1)
    events = [json.loads(line) for line in (tmp_path / "run" / "recovery.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["lost", "resumed"]
    assert f"ended with exit status {EXIT_LOST}" in events[0]["what"]
    assert events[1]["source"] == "memory"
    assert events[1]["lost"] == 1
