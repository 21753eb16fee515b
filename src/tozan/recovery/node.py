"""The ranks of one machine: started by a warm fork server, watched, and their memory kept while they come and go."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
from collections import deque
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tozan.recovery import slots


@dataclass(frozen=True)
class Event:
    """What became of a rank.

    Attributes:
        kind: `ended`, `stopped` (SIGSTOP and the like) or `continued`; `server` when the fork server itself is gone.
        rank: number among the ranks of this node; -1 for the store and the fork server.
        status: exit status, or minus the signal that ended it.
    """

    kind: Literal["ended", "stopped", "continued", "server"]
    rank: int = -1
    status: int = 0

    def __str__(self) -> str:
        if self.kind == "server":
            return "the fork server ended"
        who = "the store" if self.rank < 0 else f"rank {self.rank}"
        if self.kind != "ended":
            return f"{who} was {self.kind}"
        how = f"by {signal.Signals(-self.status).name}" if self.status < 0 else f"with exit status {self.status}"
        return f"{who} ended {how}"


class Node:
    """Starts and watches the ranks of this machine.

    Args:
        ranks: the most that will run here at once.
        inherit: further file descriptors that ranks inherit.
        output: file for what ranks print; None: where this process prints.

    Attributes:
        memory: a file descriptor per rank, see `slots`.
        processes: process id of every running rank.
    """

    def __init__(self, ranks: int, inherit: tuple[int, ...] = (), output: Path | None = None) -> None:
        self.memory = [slots.create(f"tozan rank {rank}") for rank in range(ranks)]
        self.processes: dict[int, int] = {}
        self._inherit, self._output = inherit, output
        self._events: deque[Event] = deque()
        self._pending = b""
        self._port = 0
        self._start_server()

    def start(self, rank: int, words: list[str], environment: dict[str, str]) -> None:
        """Start `tozan WORDS` as this node's rank number `rank`."""
        self._say(start=str(rank), words=words, environment=environment)
        self._wait(lambda: rank in self.processes)

    def signal(self, rank: int, number: signal.Signals) -> None:
        """Send a signal to a rank; nothing happens if it has ended."""
        self._say(signal=str(rank), number=int(number))

    def store(self, host: str) -> int:
        """The port of the store that outlives the ranks; started again if it has ended."""
        if self._port == 0:
            self._say(store=host)
            self._wait(lambda: self._port != 0)
        return self._port

    def poll(self, seconds: float) -> list[Event]:
        """What has happened; waits for at most `seconds` for something to happen."""
        if not self._events:
            self._read(seconds)
        happened = list(self._events)
        self._events.clear()
        return happened

    def revive(self) -> None:
        """Start the fork server again after it has ended."""
        self._server.wait()
        self._socket.close()
        self.processes, self._port, self._pending = {}, 0, b""
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
        for descriptor in self.memory:
            os.close(descriptor)

    def _start_server(self) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs, self._output.open("ab") if self._output else nullcontext() as output:
            # Its own session, so that Ctrl-C reaches the agent alone; one thread, so that forking it is safe.
            self._server = subprocess.Popen(
                [sys.executable, "-m", "tozan.forkserver", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(theirs.fileno(), *self.memory, *self._inherit),
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
                start_new_session=True,
            )
        self._ready = False
        self._wait(lambda: self._ready)

    def _wait(self, done: Any) -> None:
        """Read until something has come about; gives up if the fork server ends."""
        while not done() and not any(event.kind == "server" for event in self._events):
            self._read(None)

    def _read(self, seconds: float | None) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._socket, selectors.EVENT_READ)
            if not selector.select(seconds):
                return
        try:
            received = self._socket.recv(1 << 16)
        except ConnectionError:
            received = b""
        if not received:
            self._events.append(Event("server"))
            return
        *lines, self._pending = (self._pending + received).split(b"\n")
        for line in lines:
            self._hear(json.loads(line))

    def _hear(self, said: dict[str, Any]) -> None:
        if "ready" in said:
            self._ready = True
        elif "started" in said:
            self.processes[int(said["started"])] = said["process"]
        elif "port" in said:
            self._port = said["port"]
        else:
            kind: Any
            kind, key = next(iter(said.items()))
            rank = -1 if key == "store" else int(key)
            if kind == "ended":
                self.processes.pop(rank, None)
                self._port = 0 if rank < 0 else self._port
            self._events.append(Event(kind, rank, os.waitstatus_to_exitcode(said.get("status", 0))))

    def _say(self, **words: Any) -> None:
        with contextlib.suppress(ConnectionError):  # read as the end of the server, later
            self._socket.sendall(json.dumps(words).encode() + b"\n")
