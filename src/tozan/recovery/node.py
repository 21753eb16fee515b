"""The ranks of one machine: started by a warm fork server, watched, and their memory kept while they come and go."""

from __future__ import annotations

import array
import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tozan.errors import Problem, UserError
from tozan.recovery import slots
from tozan.recovery.slots import Slots


@dataclass(frozen=True)
class Event:
    """What became of a rank.

    Attributes:
        kind: `ended`, `stopped` (SIGSTOP and the like) or `continued`; `server` when a fork server is gone, `node`
            when a whole node is.
        rank: the rank; -1 for the store, a fork server or a node.
        status: exit status, or minus the signal that ended it; the node's number when that is gone.
    """

    kind: Literal["ended", "stopped", "continued", "server", "node"]
    rank: int = -1
    status: int = 0

    def __str__(self) -> str:
        if self.kind == "server":
            return "the fork server ended"
        if self.kind == "node":
            return f"node {self.status} is gone"
        who = "the store" if self.rank < 0 else f"rank {self.rank}"
        if self.kind != "ended":
            return f"{who} was {self.kind}"
        how = f"by {signal.Signals(-self.status).name}" if self.status < 0 else f"with exit status {self.status}"
        return f"{who} ended {how}"


@dataclass(frozen=True)
class Memory:
    """What a node keeps for a rank, as file descriptors of `slots`.

    Attributes:
        own: the copies of its last two steps.
        outbox: every so many steps, a copy that stays in place until it has arrived at the neighbour.
        guest: the neighbour's copies of this rank, if this node is the neighbour.
    """

    own: int
    outbox: int
    guest: int

    def holding(self, step: int) -> int | None:
        """The one that has a good copy of a step."""
        return next((fd for fd in (self.own, self.outbox, self.guest) if step in slots.steps_of(fd)), None)

    def steps(self) -> set[int]:
        """All steps of which there is a good copy."""
        return {step for fd in (self.own, self.outbox, self.guest) for step in slots.steps_of(fd)}


class Node:
    """Starts and watches the ranks of this machine.

    Args:
        output: file for what ranks print; None: where this process prints.

    Attributes:
        memories: what is kept, by rank.
        processes: process id of every running rank; -1 is the store's.
    """

    def __init__(self, output: Path | None = None) -> None:
        self.memories: dict[int, Memory] = {}
        self.processes: dict[int, int] = {}
        self._output = output
        self._events: deque[Event] = deque()
        self._port, self._host = 0, ""
        self._start_server()

    def memory(self, rank: int) -> Memory:
        """The memory of a rank; made when it is first asked for."""
        if rank not in self.memories:
            kinds = ("own", "outbox", "guest")
            self.memories[rank] = Memory(*(slots.create(f"tozan rank {rank}, {kind}") for kind in kinds))
        return self.memories[rank]

    def start(self, rank: int, words: list[str], environment: dict[str, str], told: dict[str, Any]) -> None:
        """Start `tozan WORDS` as a rank.

        Args:
            rank: its number in the run.
            words: what it runs.
            environment: its variables.
            told: what it hears from the agent; where its memory is, is added here.
        """
        memory, resume = self.memory(rank), told["resume"]
        source = memory.holding(resume) if resume is not None else None
        slots.clear_begun(memory.own)
        descriptors = [memory.own, memory.outbox, memory.own if source is None else source]
        self._say(descriptors, start=str(rank), words=words, environment=environment, told=told)
        self._wait(lambda: rank in self.processes)

    def signal(self, rank: int, number: signal.Signals) -> None:
        """Send a signal to a rank; nothing happens if it has ended."""
        self._say(signal=str(rank), number=int(number))

    def store(self, host: str) -> int:
        """The port of the store that outlives the ranks; started again if it has ended, or listens elsewhere.

        Raises:
            UserError: it cannot listen on that address.
        """
        if self._port > 0 and host != self._host:
            self.signal(-1, signal.SIGKILL)
            self._wait(lambda: self._port == 0)
            self._events = deque(event for event in self._events if event.kind != "ended" or event.rank >= 0)
        if self._port == 0:
            self._host = host
            self._say(store=host)
            self._wait(lambda: self._port != 0)
        if self._port < 0:
            self._port = 0
            problem = f"no store for the ranks can listen on {host}; what stands in the way is above"
            raise UserError(Problem("MASTER_ADDR", problem, "give an address or name of the first node"))
        return self._port

    def steps(self) -> dict[int, set[int]]:
        """Steps of which there is a good copy here, by rank."""
        return {rank: memory.steps() for rank, memory in self.memories.items()}

    def begun(self) -> dict[int, tuple[int, int]]:
        """The steps that each rank here has begun, (last, first); zeros before its first."""
        return {rank: slots.begun(memory.own) for rank, memory in list(self.memories.items())}

    def keep(self, newest: int | None) -> None:
        """Drop the copies of steps beyond `newest` (None: all)."""
        for memory in self.memories.values():
            for descriptor in (memory.own, memory.outbox, memory.guest):
                with Slots(descriptor) as held:
                    held.forget(after=-1 if newest is None else newest)
                    if held.arrived() != held.newest():  # the neighbour drops it, too
                        slots.note_arrival(descriptor, None)

    def fileno(self) -> int:
        """What becomes readable when something has happened."""
        return self._socket.fileno()

    def events(self) -> list[Event]:
        """What has happened since the last call; does not wait."""
        while self._readable(0.0):
            self._read()
        happened = list(self._events)
        self._events.clear()
        return happened

    def revive(self) -> None:
        """Start the fork server again if it has ended."""
        if self._server.poll() is None and self._readable(0.0) and not self._socket.recv(1, socket.MSG_PEEK):
            self._server.wait()
        if self._server.poll() is None:
            return
        self._socket.close()
        self.processes, self._port = {}, 0
        self._events.clear()
        self._start_server()

    def close(self) -> None:
        """End everything that still runs here, and give the memory back."""
        self._socket.close()
        try:
            self._server.wait(10)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()
        for memory in self.memories.values():
            for descriptor in (memory.own, memory.outbox, memory.guest):
                os.close(descriptor)
        self.memories = {}

    def _start_server(self) -> None:
        # Whole messages, so that descriptors come with the command that they belong to.
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, self._output.open("ab") if self._output else nullcontext() as output:
            # Its own session, so that Ctrl-C reaches the agent alone; one thread, so that forking it is safe.
            self._server = subprocess.Popen(
                [sys.executable, "-m", "tozan.forkserver", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(theirs.fileno(),),
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
                start_new_session=True,
            )
        self._ready = False
        self._wait(lambda: self._ready)

    def _wait(self, done: Callable[[], bool]) -> None:
        """Read until something has come about; gives up if the fork server ends."""
        while not done() and not any(event.kind == "server" for event in self._events):
            self._read()

    def _readable(self, seconds: float) -> bool:
        if any(event.kind == "server" for event in self._events):
            return False
        with selectors.DefaultSelector() as selector:
            selector.register(self._socket, selectors.EVENT_READ)
            return bool(selector.select(seconds))

    def _read(self) -> None:
        try:
            received = self._socket.recv(1 << 16)
        except ConnectionError:
            received = b""
        if not received:
            self._events.append(Event("server"))
            return
        said = json.loads(received)
        if "ready" in said:
            self._ready = True
        elif "started" in said:
            self.processes[int(said["started"])] = said["process"]
        elif "port" in said:
            self._port = said["port"] or -1
        else:
            kind: Any
            kind, key = next(iter(said.items()))
            rank = int(key)
            if kind == "ended":
                self.processes.pop(rank, None)
                self._port = 0 if rank < 0 else self._port
            self._events.append(Event(kind, rank, os.waitstatus_to_exitcode(said.get("status", 0))))

    def _say(self, descriptors: list[int] | None = None, **words: Any) -> None:
        message = json.dumps(words).encode()
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        with contextlib.suppress(ConnectionError):  # read as the end of the server, later
            self._socket.sendmsg([message], rights)
