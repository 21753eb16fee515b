"""`tozan agent`: an agent with its signals, its log, and its place among the nodes of a job."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from tozan.amounts import many
from tozan.config import load
from tozan.errors import Problem, UserError, say
from tozan.recovery.agent import Agent, Policy
from tozan.recovery.elastic import fitting
from tozan.recovery.remote import Follower


def supervise(config: Path, flags: Sequence[str], nodes: int, number: int, leader: tuple[str, int]) -> int:
    """Run a config to the end with this node's agent.

    Args:
        config: the TOML file.
        flags: that replace its values.
        nodes: of the job; each has its agent.
        number: of this node; 0 leads.
        leader: address and port of the leading agent.

    Returns:
        The exit status.

    Raises:
        UserError: a mistake in the config, or the leader cannot listen on that address.
    """
    found = load(config, flags).config
    if number:
        with handled_by(signal.SIG_IGN):  # schedulers warn all agents of a job; the leading one acts on it
            follower = Follower(leader)
            try:
                return follower.run(found.recovery.wait)
            finally:
                follower.close()
    log = Path(found.run.folder) / "recovery.jsonl"
    together = -(-found.layout.processes // nodes)
    agent = Agent(
        ["train", str(config.resolve()), *flags],
        partial(fitting, config, flags, together=together),
        together,
        policy(found),
        partial(note, log),
    )
    with handled_by(agent.ask_to_stop):
        try:
            if nodes > 1:
                _listen(agent, leader, nodes, found.recovery.wait)
            return agent.run()
        finally:
            agent.close()


@contextmanager
def handled_by(handler: Any) -> Iterator[None]:
    """Inside the block, signals that ask a job to stop go to `handler`."""
    asking = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.signal(number, handler) for number in asking}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _listen(agent: Agent, leader: tuple[str, int], nodes: int, patience: float) -> None:
    try:
        agent.crew.listen(*leader, nodes, patience)
    except OSError as error:
        problem = f"the leading agent cannot listen on {leader[0]}:{leader[1]}: {error.strerror}"
        fix = "give an address or name of the first node, and a port that is free there"
        raise UserError(Problem("MASTER_ADDR, MASTER_PORT", problem, fix)) from error


def policy(config: Any) -> Policy:
    """What `[recovery]` asks for."""
    table = config.recovery
    compiler = config.train.compile or {config.train.recompute, *config.train.recompute_stages} != {"none"}
    return Policy(table.copies, table.neighbour, table.restarts, table.stopped, compiler=compiler)


def note(log: Path, event: dict[str, Any]) -> None:
    """Print an event as a line for people, and append it to the log as JSON; a full disk costs the log, not the run."""
    if event["event"] == "lost":
        text = f"{event['what']}, in step {event['step']}"
    elif event["event"] == "resumed":
        text = (
            f"generation {event['generation']} continues after step {event['step']} from {event['source']}, "
            f"{many(event['lost'], 'step')} lost, {event['seconds']:.1f} s"
        )
    elif event["event"] == "grows":
        text = f"a node has come, in step {event['step']}"
    elif event["event"] == "layout":
        text = f"goes on with {many(event['ranks'], 'rank')} {' '.join(event['flags'])}"
    else:
        text = f"step {event['step']} rescued from memory: {'yes' if event['whole'] else 'no'}"
    say(text)
    try:
        log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")
    except OSError as error:
        say(f"{log} could not be written: {error.strerror}")
