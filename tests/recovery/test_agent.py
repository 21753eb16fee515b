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
from tozan.recovery import agent as agents
from tozan.recovery.agent import Agent, Policy
from tozan.recovery.elastic import Shape, fitting
from tozan.recovery.node import Event
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


class Ranks:
    """A crew of two ranks that are killed at once, in generations that get as far as they are told.

    Args:
        script: of each generation: the step whose copies it finds (None: none), and the first and last that it begins.
    """

    def __init__(self, script):
        self.script, self.ranks, self.told = list(script), 2, []

    def newest(self, _ranks):
        return self.script[0][0]

    def begun(self, places):
        return dict.fromkeys(places, self.script[0][2:0:-1])

    def places(self, ranks, _newest):
        return dict.fromkeys(range(ranks), self)

    def start(self, rank, _words, _variables, told):
        if rank == 0:
            self.told.append(told)

    def poll(self, _seconds):
        return [Event("ended", rank, -signal.SIGKILL) for rank in range(2)]

    def revive(self):
        self.script.pop(0)

    def variables(self, _rank, _places):
        return {}

    def nothing(self, *_):
        return None

    keep = signal = link = arrivals = wait_for_return = nothing


def test_only_ranks_that_have_taken_a_step_and_read_no_files_are_waited_for_less_long(monkeypatch):
    # The fourth dies in its first step, as if that had been slower than patience; the fifth has all of it again.
    script = [(None, 1, 3), (2, 3, 5), (None, 4, 6), (6, 7, 7), (6, 7, 9), (8, 0, 0)]
    crew = Ranks(script)
    monkeypatch.setattr(agents, "Node", lambda _output: None)
    monkeypatch.setattr(agents, "Crew", lambda _node, _ranks: crew)
    agent = Agent(["train"], lambda ranks: Shape(2) if ranks == 2 else None, 2, Policy(restarts=1))
    assert agent.run() == 1
    assert [told["warm"] for told in crew.told] == [False, True, False, True, False, True]
