"""Nodes of one run: the agent of the first leads, those of the others follow, over one connection each.

Messages are JSON lines. Both sides speak several times a second, so that silence means that the other is gone, also
where a cable was pulled and no connection was ever closed.
"""

from __future__ import annotations

import contextlib
import json
import selectors
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

from tozan.comm.place import listen
from tozan.errors import EXIT_LOST, say
from tozan.recovery.courier import Courier, Guests, token
from tozan.recovery.node import Event, Node

BEAT = 0.1
"""Seconds between signs of life."""
SILENCE = 5.0
"""Seconds of silence after which the other side is gone."""


class Wire:
    """One connection, in whole messages."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(SILENCE)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket, self._pending, self.heard = connection, b"", time.monotonic()
        self._turn = threading.RLock()  # a signal's handler may have something to say while its thread speaks
        self._over = threading.Event()

    def say(self, **words: Any) -> None:
        """Send a message.

        Raises:
            OSError: the other side is gone.
        """
        with self._turn:
            self.socket.sendall(json.dumps(words).encode() + b"\n")

    def beat(self) -> None:
        """Give signs of life from now on, by a thread: reading through gigabytes of copies keeps an agent busy."""
        threading.Thread(target=self._beat, name="tozan-beat", daemon=True).start()

    def _beat(self) -> None:
        with contextlib.suppress(OSError):  # until the connection is closed, on either side
            while not self._over.wait(BEAT):
                self.say(beat=True)

    def fall_silent(self) -> None:
        """No more signs of life: the other side, if it still hears this one, is to know that it has been given up."""
        self._over.set()

    def hear(self) -> list[dict[str, Any]]:
        """Messages that have come; does not wait.

        Raises:
            OSError: the other side is gone or silent.
        """
        with selectors.DefaultSelector() as selector:
            selector.register(self.socket, selectors.EVENT_READ)
            if selector.select(0):
                received = self.socket.recv(1 << 16)
                if not received:
                    raise ConnectionError("closed")
                self.heard = time.monotonic()
                *lines, self._pending = (self._pending + received).split(b"\n")
                return [json.loads(line) for line in lines]
        if time.monotonic() - self.heard > SILENCE:
            raise TimeoutError("silent")
        return []


class Remote:
    """Another node, as the leader sees it; used like `Node`.

    Args:
        wire: to its follower.
        hello: what the follower said first.

    Attributes:
        gone: there is no connection any more.
        silent: because nothing was heard, not because it was closed.
    """

    def __init__(self, wire: Wire, hello: dict[str, Any]) -> None:
        self.wire, self.gone, self.silent = wire, False, False
        self.guests: tuple[str, int] = (wire.socket.getpeername()[0], hello["guests"])
        self.processes: dict[int, int] = {}
        self._begun: dict[int, tuple[int, int]] = {}
        self._steps: dict[int, set[int]] | None = None
        self._events: list[Event] = []
        self._starts = 0
        wire.beat()

    def start(self, rank: int, words: list[str], environment: dict[str, str], told: dict[str, Any]) -> None:
        """See `Node.start`."""
        self._starts += 1
        self.processes[rank], self._begun[rank] = 0, (0, 0)
        self._say(start=rank, words=words, environment=environment, told=told)

    def signal(self, rank: int, number: signal.Signals) -> None:
        """See `Node.signal`."""
        self._say(signal=rank, number=int(number))

    def steps(self) -> dict[int, set[int]]:
        """See `Node.steps`; waits for the answer."""
        self._steps = None
        self._say(steps=True)
        while self._steps is None and not self.gone:
            self._hear()
            time.sleep(0.002)
        return self._steps or {}

    def begun(self) -> dict[int, tuple[int, int]]:
        """See `Node.begun`."""
        return dict(self._begun)

    def keep(self, newest: int | None) -> None:
        """See `Node.keep`."""
        self._say(keep=newest)

    def carry_to(self, address: tuple[str, int] | None) -> None:
        """Tell it who its neighbour is."""
        self._say(neighbour=address)

    def events(self) -> list[Event]:
        """See `Node.events`."""
        self._hear()
        happened, self._events = self._events, []
        return happened

    def fileno(self) -> int:
        """See `Node.fileno`."""
        return self.wire.socket.fileno()

    def revive(self) -> None:
        """See `Node.revive`."""
        self._say(revive=True)

    def say_goodbye(self) -> None:
        """Let its follower end."""
        self._say(bye=True)

    def close(self) -> None:
        """See `Node.close`; its follower has been told."""
        with contextlib.suppress(OSError):  # closed with words of the other side unread, it might not hear the last one
            self.wire.socket.shutdown(socket.SHUT_WR)
            while self.wire.socket.recv(1 << 16):
                pass
        self.wire.socket.close()

    def _say(self, **words: Any) -> None:
        if not self.gone:
            try:
                self.wire.say(**words)
            except OSError:
                self._lose(silent=False)

    def _hear(self) -> None:
        if self.gone:
            return
        try:
            messages = self.wire.hear()
        except OSError as error:
            self._lose(silent=isinstance(error, TimeoutError))
            return
        for said in messages:
            if "begun" in said and said["starts"] == self._starts:
                self._begun = {int(rank): (last, first) for rank, (last, first) in said["begun"].items()}
            elif "steps" in said:
                self._steps = {int(rank): set(steps) for rank, steps in said["steps"].items()}
            elif "event" in said:
                event = Event(said["event"], said["rank"], said["status"])
                if event.kind == "ended":
                    self.processes.pop(event.rank, None)
                self._events.append(event)

    def _lose(self, silent: bool) -> None:
        self.gone, self.silent = True, silent
        self.wire.fall_silent()


class Follower:
    """The agent of a node that does not lead: does what it is told.

    Args:
        leader: address and port.
        output: see `Node`.
    """

    def __init__(self, leader: tuple[str, int], output: Path | None = None) -> None:
        self._leader, self.node = leader, Node(output=output)
        self._courier = Courier(self.node)
        self._guests: Guests | None = None
        self._courier.start()
        self._starts, self._over = 0, False

    def run(self, patience: float) -> int:
        """Follow until the leader says goodbye.

        Args:
            patience: seconds for which a leader that is gone is looked for.

        Returns:
            0, or `EXIT_LOST` if there is no leader any more.
        """
        since = time.monotonic()
        while time.monotonic() - since < patience:
            try:
                with socket.create_connection(self._leader, timeout=1.0) as connection:
                    self._follow(Wire(connection))
            except OSError:
                pass
            if self._over:
                return 0
            self._end_ranks()
            if self._starts:
                since, self._starts = time.monotonic(), 0
            time.sleep(0.2)
        say("the leading agent is gone")
        return EXIT_LOST

    def close(self) -> None:
        """End what still runs here."""
        self._courier.stop()
        if self._guests is not None:
            self._guests.stop()
        self.node.close()

    def _follow(self, wire: Wire) -> None:
        if self._guests is None:  # at the address that the leader sees
            self._guests = Guests(self.node, listen(wire.socket.getsockname()[0], one_machine=True))
            self._guests.start()
        wire.say(hello=socket.gethostname(), guests=self._guests.port, token=token())
        wire.beat()
        spoke = 0.0
        while not self._over:
            with selectors.DefaultSelector() as selector:
                selector.register(wire.socket, selectors.EVENT_READ)
                selector.register(self.node.fileno(), selectors.EVENT_READ)
                selector.select(BEAT)
            for event in self.node.events():
                wire.say(event=event.kind, rank=event.rank, status=event.status)
                if event.kind == "server":
                    self.node.revive()
            for command in wire.hear():
                self._obey(wire, command)
            if time.monotonic() - spoke > BEAT / 2:
                spoke = time.monotonic()
                wire.say(begun=self.node.begun(), starts=self._starts)

    def _obey(self, wire: Wire, command: dict[str, Any]) -> None:
        if "start" in command:
            self._starts += 1
            self.node.start(command["start"], command["words"], command["environment"], command["told"])
        elif "signal" in command:
            self.node.signal(command["signal"], signal.Signals(command["number"]))
        elif "steps" in command:
            wire.say(steps={rank: sorted(steps) for rank, steps in self.node.steps().items()})
        elif "keep" in command:
            self.node.keep(command["keep"])
        elif "neighbour" in command:
            self._courier.neighbour(tuple(command["neighbour"]) if command["neighbour"] else None)
        elif "bye" in command:
            self._over = True

    def _end_ranks(self) -> None:
        while any(rank >= 0 for rank in self.node.processes):
            for rank in list(self.node.processes):
                self.node.signal(rank, signal.SIGKILL)
            if any(event.kind == "server" for event in self.node.events()):
                self.node.revive()  # its ranks have ended with it, and nobody is left to say so
            time.sleep(0.01)
