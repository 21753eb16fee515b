"""The ranks of a run as the crew that saves its checkpoints (see `checkpoint.crew`)."""

from __future__ import annotations

import contextlib
import time

from tozan.checkpoint.crew import Alone, Broken
from tozan.checkpoint.crew import Crew as AnyCrew
from tozan.comm import Mesh
from tozan.comm.collectives import CommunicationError
from tozan.comm.texts import all_gather_texts

_PAUSE_S = (0.005, 0.2)
"""Between two looks into the store: at first, and at most."""


class Crew:
    """All ranks of a mesh: the main threads meet in a collective, the writers in the job's store."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh, self._axis, self._store = mesh, mesh.everyone, mesh.store
        self.rank, self.size = mesh.rank, mesh.world_size
        self._broken = False
        self._parted: str | None = None

    @staticmethod
    def of(mesh: Mesh) -> AnyCrew:
        """The crew of a mesh: a collective, the first time."""
        return Alone() if mesh.world_size == 1 else Crew(mesh)

    def exchange(self, text: str) -> list[str]:
        """A collective over all ranks."""
        return all_gather_texts(text, self._axis, name="checkpoint")

    def tell(self, key: str, text: str) -> None:
        """Leave a text in the store."""
        self._store.set(f"{key}/{self.rank}", text)

    def hear(self, key: str) -> list[str]:
        """Look until all are there; never waits inside of the store, which other threads use, too."""
        keys = [f"{key}/{rank}" for rank in range(self.size)]
        self._await(keys)
        texts = [self._store.get(each).decode() for each in keys]
        for each in keys:
            self._store.delete_key(each)
        return texts

    def part(self, key: str) -> None:
        """Rank 0 leaves a word, and takes its last one away: by the next save everyone has read it."""
        if self.rank != 0:
            self._await([f"{key}/over"])
            return
        with contextlib.suppress(RuntimeError):  # a store that is gone ends the job anyway
            self._store.set(f"{key}/over", "")
            if self._parted is not None:
                self._store.delete_key(self._parted)
        self._parted = f"{key}/over"

    def _await(self, keys: list[str]) -> None:
        pause, ledger = _PAUSE_S[0], self._mesh.ledger
        ledger.listening = True
        try:
            while not self._store.check(keys):
                if self._broken:
                    raise Broken("a rank is gone, its part of the checkpoint will not come")
                time.sleep(pause)
                pause = min(2 * pause, _PAUSE_S[1])
        except RuntimeError as error:  # torch's, for a closed connection
            raise Broken("the job's store is gone") from error
        finally:
            ledger.listening = False

    def breaks(self, error: BaseException) -> bool:
        """A collective that failed says that a rank is gone."""
        self._broken = isinstance(error, CommunicationError)
        return self._broken
