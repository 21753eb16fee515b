"""The agent: starts the ranks of a run, watches them, and after any loss lets them all begin a new generation.

A generation is a set of ranks that joined one another once. When one of them is lost, the rest cannot go on (a gloo
group that has lost a member is dead), so all are ended and forked anew from a process that has everything imported;
they continue from the newest step of which every rank has a copy in memory, else from the newest good checkpoint. The
store through which they meet belongs to no generation.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from tozan.errors import EXIT_AGAIN
from tozan.recovery import slots
from tozan.recovery.node import Event, Node
from tozan.recovery.slots import Slots

_USER_ERROR, _INTERRUPTED = 2, 130


@dataclass(frozen=True)
class Policy:
    """How losses are met.

    Attributes:
        copies: keep copies of the state in memory.
        restarts: restarts in a row without a new step, after which the agent gives up.
        stopped: seconds that a rank may stand stopped (SIGSTOP) before it counts as lost.
        leave: seconds that ranks have for leaving once the first has left.
    """

    copies: bool = True
    restarts: int = 10
    stopped: float = 10.0
    leave: float = 120.0


@dataclass
class Generation:
    """One set of ranks.

    Attributes:
        number: counted from 1.
        started: seconds of the monotonic clock.
        ended: exit status by rank.
        stopped: since when ranks stand stopped.
        lost: the events that ended it.
        begun: whether every rank has begun a step.
    """

    number: int
    started: float
    ended: dict[int, int] = field(default_factory=dict)
    stopped: dict[int, float] = field(default_factory=dict)
    lost: list[Event] = field(default_factory=list)
    begun: bool = False


class Agent:
    """Runs `tozan WORDS` on as many ranks as asked for, until it is done or cannot be done.

    Args:
        words: what every rank runs, as in `["train", "run.toml"]`.
        ranks: their number.
        policy: how losses are met.
        on_event: is told what happens, as `{"event": ..., "generation": ..., ...}`.
        environment: further variables of every rank.
        inherit: further file descriptors of every rank.
        output: file for what ranks print; None: where the agent prints.

    Attributes:
        node: this machine's ranks.
        reached: the newest step that any rank has begun.
        on_event: see above.
    """

    def __init__(
        self,
        words: Sequence[str],
        ranks: int,
        policy: Policy,
        on_event: Callable[[dict[str, Any]], None] = lambda _: None,
        environment: dict[str, str] | None = None,
        inherit: tuple[int, ...] = (),
        output: Path | None = None,
    ) -> None:
        self.words, self.ranks, self.policy = list(words), ranks, policy
        self.node = Node(ranks, inherit, output)
        self.reached = 0
        self.on_event, self._environment = on_event, dict(environment or {})
        self._asked: signal.Signals | None = None
        self._fruitless, self._counted, self._lost_at, self._forget = 0, -1, 0.0, False

    def run(self) -> int:
        """Run to the end.

        Returns:
            0 when done; `EXIT_AGAIN` when stopped on request; else the status of the rank that could not go on.
        """
        number, status = 0, None
        while status is None:
            number += 1
            status = self._judge(self._generation(number))
        return status

    def ask_to_stop(self, number: int, _frame: FrameType | None = None) -> None:
        """Pass a signal on to every rank; they agree on a step, save, and leave. Fit to be a signal handler."""
        self._asked = signal.Signals(number)
        for rank in list(self.node.processes):
            self.node.signal(rank, self._asked)

    def begun(self) -> list[tuple[int, int]]:
        """The step that each rank has begun last, and when, in ns of the monotonic clock."""
        return [slots.begun(descriptor) for descriptor in self.node.memory]

    def forget_copies(self) -> None:
        """Let the next generation find no copy in memory, as if the node had been lost; for tests of that."""
        self._forget = True

    def close(self) -> None:
        """End what still runs."""
        self.node.close()

    def _generation(self, number: int) -> Generation:
        """Start all ranks and watch them until none is left."""
        resume = self._newest_copy()
        port = self.node.store("127.0.0.1")
        generation = Generation(number, time.monotonic())
        for rank in range(self.ranks):
            self.node.start(rank, self.words, self._variables(rank, port, number, resume))
        if self._asked is not None:
            self.ask_to_stop(self._asked)
        give_up = float("inf")
        while len(generation.ended) < self.ranks:
            for event in self.node.poll(0.02 if not generation.begun else 0.2):
                self._note(generation, event)
            if any(event.kind == "server" for event in generation.lost):
                break
            now = time.monotonic()
            if not generation.begun:
                self._look_for_steps(generation, resume)
            if generation.ended and give_up == float("inf"):
                give_up = now + self.policy.leave
            late = now > give_up or any(now - since > self.policy.stopped for since in generation.stopped.values())
            if generation.lost or late:
                self._end_all(generation)
                give_up = now + self.policy.leave
        self.reached = max(self.reached, max((step for step, _ in self.begun()), default=0))
        return generation

    def _note(self, generation: Generation, event: Event) -> None:
        if event.kind == "stopped":
            generation.stopped[event.rank] = time.monotonic()
        elif event.kind == "continued":
            generation.stopped.pop(event.rank, None)
        elif event.rank < 0:
            generation.lost.append(event)
        else:
            generation.ended[event.rank] = event.status
            generation.stopped.pop(event.rank, None)
            if event.status not in (0, EXIT_AGAIN, _INTERRUPTED):
                generation.lost.append(event)

    def _end_all(self, generation: Generation) -> None:
        if not self._lost_at:
            self._lost_at = time.monotonic()
        generation.lost += [Event("stopped", rank) for rank in generation.stopped]
        generation.stopped.clear()
        for rank in list(self.node.processes):
            if rank >= 0:
                self.node.signal(rank, signal.SIGKILL)

    def _judge(self, generation: Generation) -> int | None:
        """What follows from how a generation ended: an exit status, or None for another generation."""
        statuses = set(generation.ended.values())
        if not generation.lost and statuses == {0}:
            return 0
        if not generation.lost and statuses <= {EXIT_AGAIN, _INTERRUPTED} and self._asked is not None:
            return _INTERRUPTED if self._asked == signal.SIGINT else EXIT_AGAIN
        first = generation.lost[0] if generation.lost else None
        what = str(first) if first else "asked to stop, but not by the agent"
        self._lost_at = self._lost_at or time.monotonic()
        self._tell("lost", generation.number, what=what, step=self.reached, started=generation.begun)
        if generation.number == 1 and not generation.begun and first is not None and first.status == _USER_ERROR:
            return _USER_ERROR  # a mistake in the config does not go away
        self._fruitless = 1 if generation.begun and self._new_steps() else self._fruitless + 1
        if self._fruitless > self.policy.restarts:
            print(f"tozan: gave up after {self.policy.restarts} restarts without a new step", file=sys.stderr)
            return (first.status if first and first.status > 0 else None) or 1
        if first is not None and first.kind == "server":
            self.node.revive()
        return None

    def _new_steps(self) -> bool:
        before, self._counted = self._counted, self.reached
        return self.reached > before

    def _newest_copy(self) -> int | None:
        """The newest step of which every rank has a good copy; newer ones are dropped."""
        if not self.policy.copies:
            return None
        memories = [Slots(descriptor) for descriptor in self.node.memory]
        common = set.intersection(*(set(memory.steps()) for memory in memories))
        if self._forget:
            common, self._forget = set(), False
        newest = max(common, default=None)
        for memory in memories:
            memory.forget(after=-1 if newest is None else newest)
            memory.close()
        return newest

    def _look_for_steps(self, generation: Generation, resume: int | None) -> None:
        """See whether every rank has begun its first step, and if so from where it continues."""
        begun = self.begun()
        if any(when / 1e9 < generation.started for _, when in begun):
            return
        generation.begun = True
        if generation.number > 1:
            continues = max(step for step, _ in begun) - 1
            self._tell(
                "resumed",
                generation.number,
                step=continues,
                source="memory" if resume is not None else "checkpoint",
                lost=max(0, self.reached - continues),
                seconds=min(when for _, when in begun) / 1e9 - self._lost_at,
            )
            self.reached = continues
        self._lost_at = 0.0

    def _variables(self, rank: int, port: int, number: int, resume: int | None) -> dict[str, str]:
        told = {"generation": number, "memory": self.node.memory[rank], "resume": resume, "copies": self.policy.copies}
        return self._environment | {
            "RANK": str(rank),
            "WORLD_SIZE": str(self.ranks),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(self.ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TOZAN_AGENT": json.dumps(told),
        }

    def _tell(self, event: str, generation: int, **values: Any) -> None:
        self.on_event({"event": event, "generation": generation, "at": time.monotonic_ns(), **values})


def say(event: dict[str, Any]) -> None:
    """Print an event as a line for people."""
    if event["event"] == "lost":
        text = f"{event['what']} in step {event['step']}"
    elif event["event"] == "resumed":
        text = (
            f"generation {event['generation']} continues after step {event['step']} from {event['source']}, "
            f"{event['lost']} steps lost, {event['seconds']:.1f} s"
        )
    else:
        text = json.dumps(event)
    print(f"tozan: {text}", file=sys.stderr, flush=True)


def supervise(words: Sequence[str], ranks: int, policy: Policy, log: Path) -> int:
    """Run an agent in the main thread until the end, with its signals and its log file.

    Args:
        words: what every rank runs.
        ranks: their number.
        policy: how losses are met.
        log: file that events are appended to, as JSON lines.
    """

    def note(event: dict[str, Any]) -> None:
        say(event)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")

    agent = Agent(words, ranks, policy, note)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, agent.ask_to_stop)
    try:
        return agent.run()
    finally:
        agent.close()
