"""Who speaks when the job's store is gone and nothing is left to agree in: one rank of the job, wherever that can be.

Rank 1 and the first rank of each machine may speak. The first three of them listen, and tell each other where when
they join. Whoever is to speak first tries to reach those before it: if one answers, that one speaks. So a machine that
was lost with rank 0 is reported once, by the first of the others; only if all three are gone or cannot be reached do
several speak.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import suppress

from tozan.comm.place import listen

ASKED = 3
"""How many ranks are asked for."""
_ANSWER_S = 1.0
"""How long one that is behind a cut cable is asked for."""


class Speaker:
    """Whether this rank speaks; asked once it is known that the store is gone.

    Args:
        may: whether this rank is one of those that may speak.
    """

    def __init__(self, may: bool) -> None:
        self.may, self._before = may, list[str]()
        self._listening: socket.socket | None = None

    def listen(self, address: str) -> str:
        """Listen, and return where, to be told to all ranks; empty where it cannot be, so that nobody finds this rank.

        Args:
            address: of this machine, as the others see it.
        """
        with suppress(OSError):
            self._listening = listen(address, one_machine=True)
        return "{}:{}".format(*self._listening.getsockname()) if self._listening else ""

    def introduce(self, everyone: Sequence[str], rank: int) -> None:
        """Hear where every rank listens, in order of the ranks; `rank` is this one."""
        listening = [number for number, where in enumerate(everyone) if where][:ASKED]
        self._before = [everyone[number] for number in listening if number < rank]
        if rank not in listening:
            self.close()

    def speaks(self) -> bool:
        """Whether no rank before this one can be reached."""
        return self.may and not any(_reached(where) for where in self._before)

    def close(self) -> None:
        """Listen no longer."""
        if self._listening:
            self._listening.close()
            self._listening = None

    @property
    def stays(self) -> bool:
        """Whether others may ask for this rank, so that it must not leave before they have."""
        return self._listening is not None


def _reached(where: str) -> bool:
    address, _, port = where.rpartition(":")
    try:
        socket.create_connection((address, int(port)), timeout=_ANSWER_S).close()
    except OSError:
        return False
    return True
