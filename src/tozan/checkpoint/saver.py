"""Saving beside training: a copy of the state is taken at once and written by a thread."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from tozan import files
from tozan.checkpoint import folders
from tozan.checkpoint.state import State, check
from tozan.checkpoint.writer import MAX_FILE_BYTES, write


class Saver:
    """Saves a run's checkpoints and deletes old ones. Use it as a context manager.

    At most one write is in flight: a save that comes before the last is written waits for it. An error of the
    writer comes up in the next `save`, `wait` or `close`.

    Attributes:
        root: the folder of checkpoints.
        swept: what earlier, killed saves had left and this start has deleted.
        last: the newest checkpoint written by this saver, or None.
    """

    def __init__(
        self,
        root: Path,
        keep_last: int = 2,
        keep_every: int = 0,
        background: bool = True,
        max_file_bytes: int = MAX_FILE_BYTES,
    ) -> None:
        """Make the folder if it is missing, and sweep it.

        Args:
            root: the folder of checkpoints.
            keep_last: newest checkpoints to keep, at least 1.
            keep_every: also keep steps that are a multiple of this; 0 keeps none.
            background: write in a thread from a copy (costs the state's size in memory); else in the caller.
            max_file_bytes: start another file when one would grow beyond this.

        Raises:
            UserError: the folder cannot be made or listed.
        """
        self.root = root
        self.last: Path | None = None
        self._keep = (keep_last, keep_every)
        self._background = background
        self._max_file_bytes = max_file_bytes
        self._copies: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        with files.naming(root, "make"):
            root.mkdir(parents=True, exist_ok=True)
        self.swept = folders.sweep(root)

    def save(self, state: State) -> None:
        """Save a state; when this returns, its tensors may be changed.

        Raises:
            UserError: this write (in the foreground) or the one before (in the background) failed.
            ValueError: the state has names or numbers that the format does not carry.
            TypeError: the state has tensors or meta that the format does not carry.
        """
        trainer = check(state)
        self.wait()
        if not self._background:
            self._write(state, trainer)
            return
        copy = State(state.step, self._snapshot(state.tensors), files=dict(state.files))
        self._thread = threading.Thread(target=self._work, args=(copy, trainer), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Wait until nothing is in flight.

        Raises:
            UserError: the write failed.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Wait, and free the copies.

        Raises:
            UserError: the last write failed.
        """
        self._copies = {}
        self.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except Exception as failed:
            if error is None:
                raise
            error.add_note(f"and the last checkpoint was not saved: {failed}")

    def _snapshot(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy into the buffers of the save before: new memory would cost a page fault for every 4 KiB."""
        copies = {}
        for name, tensor in tensors.items():
            copy = self._copies.get(name)
            if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
                copy = torch.empty(tensor.shape, dtype=tensor.dtype)
            copies[name] = copy.copy_(tensor.detach())
        self._copies = copies
        return copies

    def _write(self, state: State, trainer: bytes) -> None:
        self.last = write(self.root, state, trainer, self._max_file_bytes)
        folders.retain(self.root, state.step, *self._keep)

    def _work(self, state: State, trainer: bytes) -> None:
        try:
            self._write(state, trainer)
        except BaseException as error:
            self._error = error
