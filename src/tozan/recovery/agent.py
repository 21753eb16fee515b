"""The agent: starts the ranks of a run, watches them, and after any loss lets them all begin a new generation.

A generation is a set of ranks that joined one another once. When one of them is lost, the rest cannot go on (a gloo
group that has lost a member is dead), so all are ended and forked anew from a process that has everything imported;
they continue from the newest step of which every rank has a copy in memory, else from the newest good checkpoint. The
store through which they meet belongs to no generation.

With several nodes, the first one's agent leads (see `remote`). A node that is gone takes its ranks with it: what its
neighbour has of them is written to a checkpoint together with the rest, by a generation that does nothing else, and
the run goes on in the nearest layout for the ranks that are left (see `elastic`), until the node comes back.
"""

from __future__ import annotations

import functools
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from tozan.errors import EXIT_AGAIN, say
from tozan.recovery.crew import Crew, Member
from tozan.recovery.elastic import Shape
from tozan.recovery.node import Event, Node

_USER_ERROR, _INTERRUPTED = 2, 130
_LEFT = {0, EXIT_AGAIN, _INTERRUPTED}


@dataclass(frozen=True)
class Policy:
    """How losses are met.

    Attributes:
        copies: keep copies of the state in memory.
        neighbour: steps between copies on the neighbouring node; 0: none.
        restarts: restarts in a row without a new step, after which the agent gives up.
        stopped: seconds that a rank may stand stopped (SIGSTOP) before it counts as lost.
        leave: seconds that ranks have for leaving once the first has left before the end.
        compiler: whether ranks will import PyTorch's compiler, so that the process that they are forked from does.
    """

    copies: bool = True
    neighbour: int = 0
    restarts: int = 10
    stopped: float = 10.0
    leave: float = 120.0
    compiler: bool = False


@dataclass
class Generation:
    """One set of ranks.

    Attributes:
        number: counted from 1.
        places: the node of every rank.
        resume: the step whose copies they continue from; None: the newest checkpoint.
        ended: exit status by rank.
        stopped: since when ranks stand stopped.
        lost: the events that ended it.
        begun: whether every rank has begun a step.
    """

    number: int
    places: dict[int, Member]
    resume: int | None
    ended: dict[int, int] = field(default_factory=dict)
    stopped: dict[int, float] = field(default_factory=dict)
    lost: list[Event] = field(default_factory=list)
    begun: bool = False


class Agent:
    """Runs `tozan WORDS` on as many ranks as a layout has, until it is done or cannot be done.

    Args:
        words: what every rank runs, as in `["train", "run.toml"]`.
        shape: gives the layout for a number of ranks that can be had; None if there is none.
        ranks: the most that a node holds.
        policy: how losses are met.
        on_event: is told what happens, as `{"event": ..., "generation": ..., ...}`.
        environment: further variables of every rank.
        output: file for what ranks print; None: where the agent prints.

    Attributes:
        node: this machine's ranks.
        crew: all nodes.
        reached: the newest step that every rank has begun: no step is under way before.
        on_event: see above.
    """

    def __init__(
        self,
        words: Sequence[str],
        shape: Callable[[int], Shape | None],
        ranks: int,
        policy: Policy,
        on_event: Callable[[dict[str, Any]], None] = lambda _: None,
        environment: dict[str, str] | None = None,
        output: Path | None = None,
    ) -> None:
        self.words, self.policy, self._shape_for = list(words), policy, functools.cache(shape)
        self.node = Node(output)
        self.crew = Crew(self.node, ranks)
        self.reached = 0
        self.on_event, self._environment = on_event, dict(environment or {})
        self._asked: signal.Signals | None = None
        self._shape: Shape | None = None
        self._fruitless, self._counted, self._blamed, self._limit = 0, -1, set[int](), sys.maxsize
        self._lost_at, self._forget, self._growing = 0.0, False, False
        self._stepped = False
        """Whether every rank of the generation before has taken a step."""

    def run(self) -> int:
        """Run to the end.

        Returns:
            0 when done; `EXIT_AGAIN` when stopped on request; else the status of the rank that could not go on.
        """
        number, status = 0, None
        while status is None:
            number += 1
            number += self._arrange(number)
            if self._shape is None:
                say("no layout fits the ranks that are left")
                return 1
            status = self._judge(self._generation(number, self._shape))
        return status

    def ask_to_stop(self, number: int, _frame: FrameType | None = None) -> None:
        """Pass a signal on to every rank; they agree on a step, save, and leave. Fit to be a signal handler."""
        self._asked = signal.Signals(number)
        self.crew.signal(self._asked)

    def forget_copies(self) -> None:
        """Let the next generation find no copy in memory, as if the node had been lost; for tests of that."""
        self._forget = True

    def close(self) -> None:
        """End what still runs."""
        self.crew.close()

    def _arrange(self, number: int) -> int:
        """Choose the layout for the nodes that are here; returns how many generations it took to rescue the state."""
        self._growing = False
        self.crew.wait_for_return()
        old, new = self._shape, self._fitting()
        self._shape = new
        if old is None or new == old:
            return 0
        told = new or Shape(0)
        self._tell("layout", number, ranks=told.ranks, flags=list(told.flags), forecast=told.seconds)
        rescues = 0
        if new is not None and new.ranks < old.ranks and self.crew.newest(old.ranks) is not None:
            saved = self._generation(number, old, leave=True)
            self._tell("rescued", number, step=saved.resume, whole=not saved.lost)
            rescues = 1
        self.crew.keep(None)
        return rescues

    def _generation(self, number: int, shape: Shape, leave: bool = False) -> Generation:
        """Start all ranks and watch them until none is left; with `leave` they only write a checkpoint."""
        newest = self.crew.newest(shape.ranks) if self.policy.copies and not self._forget else None
        self._forget = False
        self.crew.keep(newest)
        generation = Generation(number, self.crew.places(shape.ranks, newest), newest)
        told = {"generation": number, "resume": newest, "copies": self.policy.copies, "leave": leave}
        told["compiler"] = self.policy.compiler
        # Nothing is read from disks then, and kernels are in the caches. If that was too little patience, no step is
        # taken, and the next generation has all of it.
        told["warm"] = newest is not None and self._stepped and not leave
        told["neighbour"] = self.policy.neighbour if self.crew.link() else 0
        for rank, member in generation.places.items():
            variables = self._environment | self.crew.variables(rank, generation.places)
            member.start(rank, [*self.words, *shape.flags], variables, told)
        if self._asked is not None:
            self.ask_to_stop(self._asked)
        self._watch(generation)
        self._stepped = all(last > first > 0 for last, first in self.crew.begun(generation.places).values())
        return generation

    def _watch(self, generation: Generation) -> None:
        give_up = float("inf")
        while len(generation.ended) < len(generation.places):
            for event in self.crew.poll(0.2 if generation.begun else 0.02):
                self._note(generation, event)
            now = time.monotonic()
            if not generation.begun:
                self._look_for_steps(generation)
            elif self.crew.arrivals() and not self._growing and self._fitting() != self._shape:
                self._growing = True  # everyone saves and leaves, to begin anew with the node that has come
                self.crew.signal(signal.SIGTERM)
            if any(generation.ended.values()) and give_up == float("inf"):
                give_up = now + self.policy.leave
            late = now > give_up or any(now - since > self.policy.stopped for since in generation.stopped.values())
            if generation.lost or late:
                self._end_all(generation)
                give_up = now + self.policy.leave
            if generation.begun:
                self._count(generation)
        self._count(generation)

    def _count(self, generation: Generation) -> None:
        self.reached = max(self.reached, min(last for last, _ in self.crew.begun(generation.places).values()))

    def _fitting(self) -> Shape | None:
        return self._shape_for(min(self.crew.ranks, self._limit))

    def _note(self, generation: Generation, event: Event) -> None:
        if event.kind == "stopped":
            generation.stopped[event.rank] = time.monotonic()
        elif event.kind == "continued":
            generation.stopped.pop(event.rank, None)
        elif event.kind == "ended" and event.rank >= 0:
            generation.ended[event.rank] = event.status
            generation.stopped.pop(event.rank, None)
            if event.status not in _LEFT:
                generation.lost.append(event)
        else:  # all ranks of a node that is gone, or whose fork server is, are gone as well
            generation.lost.append(event)
            for rank, member in generation.places.items():
                if self.crew.dead(member):
                    generation.ended.setdefault(rank, -signal.SIGKILL)

    def _end_all(self, generation: Generation) -> None:
        self._lost_at = self._lost_at or time.monotonic()
        generation.lost += [Event("stopped", rank) for rank in generation.stopped]
        generation.stopped.clear()
        self.crew.signal(signal.SIGKILL)

    def _judge(self, generation: Generation) -> int | None:
        """What follows from how a generation ended: an exit status, or None for another generation."""
        statuses = set(generation.ended.values())
        first = generation.lost[0] if generation.lost else None
        if first is None and statuses == {0}:
            return 0
        if first is None and statuses <= {EXIT_AGAIN, _INTERRUPTED} and self._asked is not None:
            return _INTERRUPTED if self._asked == signal.SIGINT else EXIT_AGAIN
        self._lost_at = self._lost_at or time.monotonic()
        if first is None and self._growing:
            self._tell("grows", generation.number, step=self.reached)
        else:
            what = str(first or "asked to stop, but not by the agent")
            self._tell("lost", generation.number, what=what, step=self.reached, started=generation.begun)
        if generation.number == 1 and not generation.begun and first is not None and first.status == _USER_ERROR:
            return _USER_ERROR  # a mistake in the config does not go away
        before, self._counted = self._counted, self.reached
        if generation.begun and self.reached > before:
            self._fruitless, self._blamed = 0, set()
        self._fruitless += 1
        self._blamed.add(first.rank if first and first.status < 0 else -1)
        if self._fruitless > self.policy.restarts and not self._give_up_rank():
            say(f"gave up after {self.policy.restarts} restarts without a new step")
            return (first.status if first and first.kind == "ended" and first.status > 0 else None) or 1
        self.crew.revive()
        return None

    def _give_up_rank(self) -> bool:
        """If always the same rank was killed, go on with fewer; whether that is possible."""
        smaller = self._shape_for(self._shape.ranks - 1) if self._shape and self._shape.ranks > 1 else None
        if smaller is None or len(self._blamed) != 1 or -1 in self._blamed:
            return False
        self._limit, self._fruitless = smaller.ranks, 0
        return True

    def _look_for_steps(self, generation: Generation) -> None:
        """See whether every rank has begun its first step, and if so from where it continues."""
        begun = self.crew.begun(generation.places).values()
        if not all(first for _, first in begun):
            return
        generation.begun = True
        if generation.number > 1:
            continues = min(first for _, first in begun) - 1
            self._tell(
                "resumed",
                generation.number,
                step=continues,
                source="memory" if generation.resume is not None else "checkpoint",
                lost=max(0, self.reached - continues),
                seconds=time.monotonic() - self._lost_at,
            )
            self.reached = continues
        self._lost_at = 0.0

    def _tell(self, event: str, generation: int, **values: Any) -> None:
        self.on_event({"event": event, "generation": generation, "at": time.monotonic_ns(), **values})
