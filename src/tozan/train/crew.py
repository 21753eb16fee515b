"""The ranks of a run as the crew that saves its checkpoints (see `checkpoint.crew`)."""

from __future__ import annotations

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
        keys, pause = [f"{key}/{rank}" for rank in range(self.size)], _PAUSE_S[0]
        while not self._store.check(keys):
            if self._broken:
                raise Broken("a rank is gone, its part of the checkpoint will not come")
            time.sleep(pause)
            pause = min(2 * pause, _PAUSE_S[1])
        texts = [self._store.get(each).decode() for each in keys]
        for each in keys:
            self._store.delete_key(each)
        return texts

    def breaks(self, error: BaseException) -> bool:
        """A collective that failed says that a rank is gone."""
        self._broken = isinstance(error, CommunicationError)
        return self._broken
