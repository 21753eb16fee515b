"""The agent on one machine: what it returns, and that what it does changes no bit."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from tozan import checkpoint
from tozan.config import load
from tozan.errors import EXIT_AGAIN
from tozan.recovery.agent import Agent, Policy
from tozan.recovery.elastic import fitting
from tozan.train import train


def run(path: Path, act=lambda agent: None, words=()):
    """(exit status, events) of an agent; `act(agent)` runs beside it once every rank has begun a step."""
    events, over = [], threading.Event()
    output = path.with_suffix(".log")
    agent = Agent(
        ["train", str(path), *words], partial(fitting, path, ()), 2, Policy(restarts=2), events.append, output=output
    )

    def beside():
        while not over.is_set() and not (agent.node.begun() and all(first for _, first in agent.node.begun().values())):
            time.sleep(0.01)
        act(agent)

    thread = threading.Thread(target=beside)
    thread.start()
    try:
        return agent.run(), events
    finally:
        over.set()
        thread.join()
        agent.close()


def state(path: Path):
    found = checkpoint.load(checkpoint.resolve(path.with_suffix("")))
    # Where a rank's random generator stands at the end depends on which micro-batches were its own.
    tensors = {name: tensor for name, tensor in found.tensors.items() if name != "rng/cpu"}
    return found.step, checkpoint.state_hash(tensors), found.meta


def stop(agent):
    agent.ask_to_stop(signal.SIGTERM)


def kill_second(agent):
    """Whoever is rank 1 is killed, until there is none."""
    for _ in range(3):
        process = agent.node.processes.get(1)
        while process is None or process == agent.node.processes.get(1):
            if process is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.002)
            process = process or agent.node.processes.get(1)


@pytest.mark.timeout(600)
def test_stopped_and_continued_or_with_a_rank_that_always_dies_the_bits_are_the_same(configure):
    calm, stopped, poor = map(configure, ("calm", "stopped", "poor"))
    train(load(calm, ["--layout.data=1", "--train.accumulate=4"]))
    status, events = run(stopped, stop)
    assert status == EXIT_AGAIN
    assert events == []
    between = state(stopped)[0]
    assert 0 < between < 120
    status, events = run(stopped)
    assert status == 0
    status, events = run(poor, kill_second)
    assert status == 0
    assert [event["ranks"] for event in events if event["event"] == "layout"] == [1]
    assert sum("rank 1 ended by SIGKILL" in event.get("what", "") for event in events) == 3
    assert state(stopped) == state(calm)
    assert state(poor) == state(calm)


def test_a_mistake_of_the_user_is_not_tried_again(configure):
    path = configure("wrong")
    status, events = run(path, words=["--data.path=nowhere"])
    assert status == 2
    assert [event["event"] for event in events] == ["lost"]
    assert "nowhere" in path.with_suffix(".log").read_text()
