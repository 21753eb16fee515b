"""Where the ranks of a job find each other: a store that listens on one address, and whose values are signed.

PyTorch's store listens on every interface of its host. `serve` gives it a socket that is bound to the one address that
the ranks use: a loopback address on one machine.

With a secret (`TOZAN_SECRET`, made by whoever starts the job, the same for all ranks), `Signed` puts an HMAC-SHA256
before every value, made over where it is and what it says, and takes no value without one. gloo's addresses travel
this way, so that nobody without the secret can pose as a rank, or lead a rank to another address. It hides nothing,
cannot keep a stranger from deleting values, and ends here: what gloo's own connections carry is neither signed nor
encrypted (docs/threat-model.md).
"""

from __future__ import annotations

import hmac
import os
import socket
import threading
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from datetime import timedelta

from torch._C._distributed_c10d import Store, TCPStore

from tozan.comm.place import EVERYWHERE, VARIABLE, addresses, is_loopback, listen

TAG = 32
"""Bytes of an HMAC-SHA256."""


def secret(environment: Mapping[str, str] | None = None) -> bytes:
    """The job's secret; empty if whoever started the job made none."""
    return (os.environ if environment is None else environment).get(VARIABLE, "").encode()


def serve(host: str, port: int, *, one_machine: bool, timeout_s: float = 120.0) -> tuple[TCPStore, str]:
    """Hold the store of a job.

    Args:
        host: the name by which the ranks know this machine.
        port: where to listen; 0 takes any free port.
        one_machine: all ranks are on this machine.
        timeout_s: how long whoever asks for a value waits for it.

    Returns:
        The store and the address that it listens on. Where it cannot be known by which of this machine's addresses
        others see it (`place.outward`), it is the one by which the first of them came, and ranks of this machine, who
        cannot know it either, are told by `ask`.

    Raises:
        OSError: the address is in use, or none of this machine's; or nobody came.
    """
    listening = listen(host, port, one_machine=one_machine)
    where, port = listening.getsockname()[:2]
    if where == EVERYWHERE:
        where = sought(listening, addresses(), timeout_s)
        listening = listen(where, port, one_machine=True)
        name = socket.create_server((socket.gethostbyname(host), port))
        threading.Thread(target=_answer, args=[name, where], name="tozan-address", daemon=True).start()
    descriptor = listening.detach()  # the store closes it
    wait = timedelta(seconds=timeout_s)
    store = TCPStore(where, port, None, True, timeout=wait, wait_for_workers=False, master_listen_fd=descriptor)
    return store, where


def sought(listening: socket.socket, own: Collection[str], timeout_s: float) -> str:
    """Close a socket that listens everywhere once someone comes from another machine; who comes will come again.

    Args:
        listening: where they come.
        own: addresses of this machine.
        timeout_s: how long to wait.

    Returns:
        The address of this machine by which they came.

    Raises:
        TimeoutError: nobody came.
    """
    end = time.monotonic() + timeout_s
    with listening:
        while True:
            listening.settimeout(max(0.001, end - time.monotonic()))
            connection, (peer, *_) = listening.accept()
            with connection:
                if peer not in own and not is_loopback(peer):
                    return str(connection.getsockname()[0])


def _answer(listening: socket.socket, where: str) -> None:
    while True:
        with suppress(OSError), listening.accept()[0] as connection:
            connection.sendall(where.encode() + b"\n")


def ask(host: str, port: int, timeout_s: float) -> str:
    """The address on which this machine's rank 0 listens, as it says itself at the loopback address of its name.

    Raises:
        TimeoutError: there was no answer.
    """
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        with suppress(OSError), socket.create_connection((host, port), timeout=1.0) as connection:
            said = connection.makefile("rb").readline(64)
            if said.endswith(b"\n"):
                return said.decode().strip()
        time.sleep(0.05)
    raise TimeoutError(f"rank 0 did not say within {timeout_s:.0f} s on which address it listens")


class UnsignedError(RuntimeError):
    """A value that is not signed with the job's secret."""


class Signed(Store):
    """A store that signs what is set and refuses what is not signed; `add` counts in the clear.

    Keep it for as long as PyTorch uses it, which holds on to its C++ half only.

    Args:
        inner: where the values are kept.
        key: the job's secret.
        scope: says which part of the store this is, so that a value copied from another part is refused.
    """

    def __init__(self, inner: Store, key: bytes, scope: str) -> None:
        super().__init__()
        self._inner, self._key, self._scope = inner, key, scope.encode()

    def _tag(self, key: str, value: bytes) -> bytes:
        parts = self._scope, key.encode(), value
        return hmac.digest(self._key, b"".join(len(part).to_bytes(8, "big") + part for part in parts), "sha256")

    def _open(self, key: str, sealed: bytes) -> bytes:
        value = bytes(sealed[TAG:])
        if not hmac.compare_digest(bytes(sealed[:TAG]), self._tag(key, value)):
            raise UnsignedError(
                f"the store's value of {key!r} is not signed with this job's secret ({VARIABLE}): a stranger wrote it, "
                "or a rank was started with another secret"
            )
        return value

    def set(self, key: str, value: str | bytes) -> None:
        """Sign and keep a value."""
        plain = value.encode() if isinstance(value, str) else bytes(value)
        self._inner.set(key, self._tag(key, plain) + plain)  # type: ignore[arg-type]

    def get(self, key: str) -> bytes:
        """Wait for a value and check it.

        Raises:
            UnsignedError: it is not signed with this secret.
            RuntimeError: it did not come.
        """
        return self._open(key, self._inner.get(key))

    def multi_get(self, keys: list[str]) -> list[bytes]:
        """`get` of several."""
        return [self._open(key, value) for key, value in zip(keys, self._inner.multi_get(keys), strict=True)]

    def check(self, keys: list[str]) -> bool:
        """Whether all keys are there."""
        return self._inner.check(keys)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Wait until all keys are there."""
        if timeout is None:
            self._inner.wait(keys)
        else:
            self._inner.wait(keys, timeout)

    def add(self, key: str, amount: int) -> int:
        """Add to a counter, which is not signed."""
        return self._inner.add(key, amount)

    def delete_key(self, key: str) -> bool:
        """Remove a key."""
        return self._inner.delete_key(key)

    def num_keys(self) -> int:
        """How many keys there are."""
        return self._inner.num_keys()

    deleteKey, getNumKeys = delete_key, num_keys  # noqa: N815
    """The names that PyTorch's own stores call, a PrefixStore around this one for instance."""

    def set_timeout(self, timeout: timedelta) -> None:
        """How long `get` and `wait` wait."""
        self._inner.set_timeout(timeout)

    @property
    def timeout(self) -> timedelta:
        """See `set_timeout`."""
        found: timedelta = self._inner.timeout  # type: ignore[attr-defined]
        return found
