"""Copies on the neighbour: what lies in the outboxes here is carried to the next node, beside the training.

One connection per pair of nodes, frames of a JSON line and raw bytes. A frame cut short leaves the copy before it.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import socket
import threading
from typing import Any

from tozan.recovery.node import Node
from tozan.recovery.slots import Slots

_PAUSE = 0.05


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
        self._node, self._over = node, threading.Event()
        self._to: tuple[str, int] | None = None
        self._sent: dict[int, int] = {}

    def neighbour(self, address: tuple[str, int] | None) -> None:
        """From now on carry to `address`; None: to nobody."""
        if address != self._to:
            self._to, self._sent = address, {}

    def stop(self) -> None:
        """Come to an end."""
        self._over.set()

    def run(self) -> None:
        """Carry until stopped; a neighbour that does not answer is tried again."""
        while not self._over.wait(_PAUSE):
            to = self._to
            if to is None:
                continue
            with contextlib.suppress(OSError), socket.create_connection(to, timeout=5) as wire:
                wire.sendall(token().encode() + b"\n")
                while to == self._to and not self._over.wait(_PAUSE):
                    for rank, memory in list(self._node.memories.items()):
                        self._carry(wire, rank, memory.outbox)

    def _carry(self, wire: socket.socket, rank: int, descriptor: int) -> None:
        held = Slots(descriptor)
        step = held.newest()
        if step is not None and step != self._sent.get(rank):
            found = held.read(step)
            if found is not None:
                head, body = found
                frame = {"rank": rank, "step": step, "head": head, "length": len(body), "check": held.check(step)}
                wire.sendall(json.dumps(frame).encode() + b"\n")
                wire.sendall(body)
                self._sent[rank] = step
        held.close()


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
                self._take(stream, json.loads(line))

    def _take(self, stream: Any, frame: dict[str, Any]) -> None:
        held = Slots(self._node.memory(frame["rank"]).guest)
        body, at = held.body(frame["length"]), 0
        while at < len(body):
            count = stream.readinto(body[at:])
            if not count:
                return
            at += count
        held.commit(frame["step"], frame["head"], frame["length"], frame["check"])
        held.close()
