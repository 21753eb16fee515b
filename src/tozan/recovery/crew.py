"""All nodes of a run, as the leading agent sees them: who is here, who holds which copies, which rank goes where."""

from __future__ import annotations

import contextlib
import hmac
import selectors
import signal
import socket
import time
from collections.abc import Mapping
from typing import Any, Protocol

from tozan.comm.place import EVERYWHERE, listen, outward
from tozan.recovery.courier import Courier, Guests, token
from tozan.recovery.node import Event, Node
from tozan.recovery.remote import BEAT, Remote, Wire

_RETURN = 3.0
"""Seconds in which a node whose connection was closed may connect again; from one that fell silent nothing is hoped."""


class Member(Protocol):
    """What `Node` and `Remote` have in common."""

    processes: dict[int, int]

    def start(self, rank: int, words: list[str], environment: dict[str, str], told: dict[str, Any]) -> None: ...  # noqa: D102
    def signal(self, rank: int, number: signal.Signals) -> None: ...  # noqa: D102
    def steps(self) -> dict[int, set[int]]: ...  # noqa: D102
    def begun(self) -> dict[int, tuple[int, int]]: ...  # noqa: D102
    def keep(self, newest: int | None) -> None: ...  # noqa: D102
    def events(self) -> list[Event]: ...  # noqa: D102
    def fileno(self) -> int: ...  # noqa: D102
    def revive(self) -> None: ...  # noqa: D102
    def close(self) -> None: ...  # noqa: D102


class Crew:
    """The leader's own node, and those that follow.

    Args:
        node: this machine.
        per_node: ranks that a node holds.

    Attributes:
        address: where ranks find this machine.
    """

    def __init__(self, node: Node, per_node: int) -> None:
        self.address = "127.0.0.1"
        self._node, self._per_node = node, per_node
        self._remotes: list[Remote] = []
        self._counted = 0
        self._door: socket.socket | None = None
        self._courier: Courier | None = None
        self._guests: Guests | None = None
        self._dead: list[Member] = []
        self._closed = False

    def listen(self, address: str, port: int, nodes: int, patience: float) -> None:
        """Open the door for other nodes, and wait for them.

        Args:
            address: the name by which they know this machine.
            port: where they knock.
            nodes: in all, this one included.
            patience: seconds to wait; the run begins without those that have not come by then.
        """
        self.address = outward(address) if nodes > 1 else address
        self._door = listen(self.address, port, one_machine=self.address.startswith("127."))
        self._courier = Courier(self._node)
        self._courier.start()
        if self._door.getsockname()[0] == EVERYWHERE:
            self.address = "127.0.0.1"  # until another node has come
        else:
            self._take_guests()
        end = time.monotonic() + patience
        while len(self._members()) < nodes and time.monotonic() < end:
            self.poll(BEAT)

    @property
    def ranks(self) -> int:
        """Ranks that can be had."""
        return len(self._members()) * self._per_node

    def arrivals(self) -> bool:
        """Whether nodes are here that had no place when ranks were last placed."""
        return len(self._members()) > self._counted

    def poll(self, seconds: float) -> list[Event]:
        """What has happened on all nodes; waits for at most `seconds` for something to happen."""
        with selectors.DefaultSelector() as selector:
            watched: list[Any] = [*self._members(), *([self._door] if self._door else [])]
            for each in watched:
                selector.register(each, selectors.EVENT_READ)
            ready = [key.fileobj for key, _ in selector.select(min(seconds, BEAT) if self._remotes else seconds)]
        if self._door in ready:
            self._let_in()
        happened = self._node.events()
        if any(event.kind == "server" for event in happened):
            self._dead.append(self._node)
        for number, remote in enumerate(list(self._remotes), 1):
            happened += remote.events()
            if remote.gone:
                self._remotes.remove(remote)
                self._dead.append(remote)
                self._closed = not remote.silent
                happened.append(Event("node", -1, number))
        return happened

    def wait_for_return(self) -> None:
        """Where a connection was closed, its node may still be there, with all copies: wait a little for it."""
        end = time.monotonic() + _RETURN
        while self._closed and len(self._members()) < self._counted and time.monotonic() < end:
            self.poll(BEAT)
        self._closed = False

    def dead(self, member: Member) -> bool:
        """Whether a node, or its fork server, has ended since ranks were last placed."""
        return member in self._dead

    def newest(self, ranks: int) -> int | None:
        """The newest step of which every rank has a good copy somewhere."""
        held = [member.steps() for member in self._members()]
        common = [set[int]().union(*(steps.get(rank, set()) for steps in held)) for rank in range(ranks)]
        return max(set.intersection(*common), default=None)

    def places(self, ranks: int, step: int | None) -> dict[int, Member]:
        """A node for every rank: where its copy of `step` is, else in order, filling node after node."""
        members = self._members()
        self._counted, self._dead = len(members), []
        held = [member.steps() if step is not None else {} for member in members]
        found: dict[int, Member] = {}
        for rank in range(ranks):
            usual = rank // self._per_node
            here = [number for number, steps in enumerate(held) if step in steps.get(rank, set())]
            found[rank] = members[usual if usual in here or not here else here[0]]
        return found

    def variables(self, rank: int, places: Mapping[int, Member]) -> dict[str, str]:
        """What a rank's environment says about its place."""
        mates = [other for other, member in places.items() if member is places[rank]]
        return {
            "RANK": str(rank),
            "WORLD_SIZE": str(len(places)),
            "LOCAL_RANK": str(mates.index(rank)),
            "LOCAL_WORLD_SIZE": str(len(mates)),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self._node.store(self.address)),
        }

    def link(self) -> bool:
        """Tell every node who its neighbour is; False if there is none."""
        if self._courier is None or self._guests is None:
            return False
        addresses = [(self.address, self._guests.port), *(remote.guests for remote in self._remotes)]
        for number, remote in enumerate(self._remotes, 1):
            remote.carry_to(addresses[(number + 1) % len(addresses)])
        self._courier.neighbour(addresses[1] if self._remotes else None)
        return bool(self._remotes)

    def begun(self, places: Mapping[int, Member]) -> dict[int, tuple[int, int]]:
        """The steps that each placed rank has begun, (last, first); zeros before its first."""
        known = {id(member): member.begun() for member in places.values()}
        return {rank: known[id(member)].get(rank, (0, 0)) for rank, member in places.items()}

    def keep(self, newest: int | None) -> None:
        """Drop all copies of later steps than `newest`; None: all."""
        for member in self._members():
            member.keep(newest)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to every rank."""
        for member in self._members():
            for rank in list(member.processes):
                if rank >= 0:
                    member.signal(rank, number)

    def revive(self) -> None:
        """Start fork servers that have ended again."""
        for member in self._members():
            member.revive()

    def close(self) -> None:
        """End what still runs, everywhere."""
        for remote in self._remotes:  # before all that takes time: after `SILENCE` they would look for a lost leader
            remote.say_goodbye()
        for helper in (self._courier, self._guests):
            if helper is not None:
                helper.stop()
        if self._door is not None:
            self._door.close()
        for member in self._members():
            member.close()

    def _narrow(self, address: str) -> None:
        """From now on listen on one address only: the one by which the first node of this job has come."""
        assert self._door is not None
        port, self.address = self._door.getsockname()[1], address
        self._door.close()
        self._door = listen(address, port, one_machine=True)
        self._take_guests()

    def _take_guests(self) -> None:
        self._guests = Guests(self._node, listen(self.address, one_machine=True))
        self._guests.start()

    def _members(self) -> list[Member]:
        return [self._node, *self._remotes]

    def _let_in(self) -> None:
        assert self._door is not None
        connection, _ = self._door.accept()
        wire = Wire(connection)
        with contextlib.suppress(OSError, KeyError, ValueError, TypeError):  # whatever a stranger may say
            end = time.monotonic() + 1.0
            while time.monotonic() < end:
                for said in wire.hear():
                    if hmac.compare_digest(said["token"], token()):
                        self._remotes.append(Remote(wire, said))
                        if self._guests is None:
                            self._narrow(connection.getsockname()[0])
                        return
                time.sleep(0.01)
        connection.close()
