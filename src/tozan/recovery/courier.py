"""Copies on the neighbour: what lies in the outboxes here is carried to the next node, beside the training.

One connection per pair of nodes. A JSON line announces a copy; the other side asks for its bytes unless it has them,
and says when they have come whole. A copy cut short leaves the one before it.

Ranks fill their outboxes again only when all copies of the last time have arrived (`train.copies`), so there is always
a step that is whole wherever it is looked for. Slots hold two steps: a copy that takes longer to send than the steps
between two would otherwise be overwritten on its way, or be another step than the other ranks'.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import socket
import threading
from typing import Any

from tozan.errors import say
from tozan.recovery.node import Node
from tozan.recovery.slots import Slots, checksum, note_arrival

_PAUSE = 0.02
_PATIENCE = 5.0
"""Seconds for which the neighbour may take in nothing."""
_CHUNK = 1 << 20
_READ = 1e9
"""Bytes that the neighbour reads through in a second, at least, before it answers."""
_SEND, _WHOLE = b"?", b"+"
"""Answers: the bytes of a copy are wanted; they are here."""


def token() -> str:
    """Shows that an agent belongs to the job without sending the job's secret (TOZAN_SECRET), if there is one."""
    return hmac.new(os.environ.get("TOZAN_SECRET", "").encode(), b"tozan agent", "sha256").hexdigest()


class Courier(threading.Thread):
    """Carries this node's outboxes to the neighbour.

    Args:
        node: whose outboxes.
    """

    def __init__(self, node: Node) -> None:
        super().__init__(name="courier", daemon=True)
        self._node, self._over, self._turn = node, threading.Event(), threading.Lock()
        self._to: tuple[str, int] | None = None

    def neighbour(self, address: tuple[str, int] | None) -> None:
        """From now on carry to `address`; None: to nobody."""
        with self._turn:
            if address == self._to:
                return
            self._to = address
            for memory in self._node.memories.values():
                note_arrival(memory.outbox, None)

    def stop(self) -> None:
        """Come to an end."""
        self._over.set()

    def run(self) -> None:
        """Carry until stopped; a neighbour that does not answer is tried again."""
        while not self._over.wait(_PAUSE):
            to = self._to
            if to is None:
                continue
            with contextlib.suppress(OSError), socket.create_connection(to, timeout=_PATIENCE) as wire:
                wire.sendall(token().encode() + b"\n")
                while to == self._to and not self._over.wait(_PAUSE):
                    for rank, memory in list(self._node.memories.items()):
                        self._carry(wire, to, rank, memory.outbox)

    def _carry(self, wire: socket.socket, to: tuple[str, int], rank: int, descriptor: int) -> None:
        with Slots(descriptor) as held:
            step = held.newest()
            if step is None or step == held.arrived():
                return
            found = held.read(step)
            if found is None:  # damaged: all ranks go back to the one before
                held.forget(after=step - 1)
                return
            head, body = found
            frame = {"rank": rank, "step": step, "head": head, "length": len(body), "check": held.check(step)}
            wire.settimeout(_PATIENCE + len(body) / _READ)
            wire.sendall(json.dumps(frame).encode() + b"\n")
            answer = wire.recv(1)
            if answer == _SEND:
                for at in range(0, len(body), _CHUNK):  # a socket's patience is for a whole call
                    wire.sendall(body[at : at + _CHUNK])
                answer = wire.recv(1)
            if answer != _WHOLE:
                raise ConnectionError("the neighbour is gone")
            with self._turn:
                if to == self._to and step == held.newest():  # and not dropped meanwhile
                    note_arrival(descriptor, step)


class Guests(threading.Thread):
    """Takes in the neighbour's copies.

    Args:
        node: where to keep them.
        listening: where they are brought to.

    Attributes:
        port: where it listens.
    """

    def __init__(self, node: Node, listening: socket.socket) -> None:
        super().__init__(name="guests", daemon=True)
        self._node, self._socket = node, listening
        self.port = int(self._socket.getsockname()[1])

    def stop(self) -> None:
        """Take nobody in any more."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def run(self) -> None:
        """Accept neighbours until stopped."""
        while True:
            try:
                wire, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._take_in, args=[wire], daemon=True).start()

    def _take_in(self, wire: socket.socket) -> None:
        with wire, wire.makefile("rb") as stream, contextlib.suppress(OSError, ValueError, KeyError):
            if not hmac.compare_digest(stream.readline(128), token().encode() + b"\n"):
                return
            while line := stream.readline(1 << 20):
                if not self._take(wire, stream, json.loads(line)):
                    return
                wire.sendall(_WHOLE)

    def _take(self, wire: socket.socket, stream: Any, frame: dict[str, Any]) -> bool:
        """Have one copy, and none of a later step; whether it is whole."""
        step = frame["step"]
        with Slots(self._node.memory(frame["rank"]).guest) as held:
            held.forget(after=step)
            if step in held.steps() and held.check(step) == frame["check"]:
                return True
            held.forget(after=step - 1)  # a damaged one's slot is used before that of the copy before
            wire.sendall(_SEND)
            try:
                body, at = held.body(frame["length"]), 0
            except OSError as error:
                what = f"no memory for the copy of rank {frame['rank']} from another node: {error.strerror}"
                say(what)
                raise
            while at < len(body):
                count = stream.readinto(body[at:])
                if not count:
                    return False
                at += count
            if checksum(body) != frame["check"]:
                return False
            held.commit(step, frame["head"], frame["length"], frame["check"])
        return True
