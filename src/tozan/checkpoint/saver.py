"""Saving beside training: a copy of the state is taken at once and written by a thread, on every rank its part."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from tozan import files
from tozan.checkpoint import folders
from tozan.checkpoint.crew import Alone, Broken, Crew, settle
from tozan.checkpoint.state import Box, Pieces, State, check
from tozan.checkpoint.writer import MAX_FILE_BYTES, write
from tozan.errors import UserError

WRITER = "checkpoint"
"""Name of the thread that writes."""


class Saver:
    """Saves a run's checkpoints and deletes old ones. Use it as a context manager.

    At most one write is in flight: a save that comes before the last is written waits for it. An error of any rank's
    writer comes up on every rank, in the next `save`, `wait` or `close`.

    With several ranks, making a saver, `save`, `wait`, `close` and leaving the block without an error are calls that
    all ranks make alike: they exchange a few bytes in the main threads. The writers never take part in that.

    Attributes:
        root: the folder of checkpoints, on a file system that all ranks share.
        swept: what earlier, killed saves had left and this start has deleted.
        last: the newest checkpoint that this saver has seen to its end (on rank 0), or None.
        begun: the step of the state that was saved last, or is being saved; None before the first.
    """

    def __init__(
        self,
        root: Path,
        keep_last: int = 2,
        keep_every: int = 0,
        background: bool = True,
        max_file_bytes: int = MAX_FILE_BYTES,
        crew: Crew | None = None,
    ) -> None:
        """Make the folder if it is missing, and sweep it.

        Args:
            root: the folder of checkpoints.
            keep_last: newest checkpoints to keep, at least 1.
            keep_every: also keep steps that are a multiple of this; 0 keeps none.
            background: write in a thread from a copy (costs in memory the size of what this rank writes); else in the
                caller.
            max_file_bytes: start another file when one would grow beyond this.
            crew: the ranks that save together; by default this process is alone.

        Raises:
            UserError: the folder cannot be made or listed.
        """
        self.root = root
        self.last: Path | None = None
        self.begun: int | None = None
        self.swept: list[Path] = []
        self._keep = (keep_last, keep_every)
        self._background = background
        self._max_file_bytes = max_file_bytes
        self._crew = crew or Alone()
        self._copies: dict[tuple[str, int], Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        error = None
        if self._crew.rank == 0:
            try:
                with files.naming(root, "make"):
                    root.mkdir(parents=True, exist_ok=True)
                self.swept = folders.sweep(root)
            except UserError as refused:
                error = refused
        settle(self._crew, error)

    def save(self, state: State) -> None:
        """Save a state; when this returns, its tensors may be changed.

        Raises:
            UserError: the folder could not be made; or this write (in the foreground) or the one before (in the
                background) failed.
            ValueError: the state has names or numbers that the format does not carry.
            TypeError: the state has tensors or meta that the format does not carry.
        """
        trainer = check(state)
        staged, descriptor = self._stage(state.step, self._joined())
        self.begun = state.step
        if not self._background:
            self._work(staged, descriptor, state, trainer)
            self.wait()
            return
        copy = State(state.step, {}, files=dict(state.files), pieces=self._snapshot(state.held()))
        self._thread = threading.Thread(target=self._work, args=(staged, descriptor, copy, trainer), name=WRITER)
        self._thread.start()

    def wait(self) -> None:
        """Wait until nothing is in flight, on any rank.

        Raises:
            UserError: the write failed.
        """
        settle(self._crew, self._joined())

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
        if error is None:
            self.close()
            return
        # The other ranks may be elsewhere: no word with them here. If one is gone, its part will never come.
        self._crew.breaks(error)
        failed = self._joined()
        if failed is not None:
            error.add_note(f"and the last checkpoint was not saved: {failed}")

    def _stage(self, step: int, error: BaseException | None) -> tuple[Path, int | None]:
        """Rank 0 makes a folder, and all hear its name; or all hear of an error, and there is none.

        Returns:
            The folder, and on rank 0 the descriptor of its lock.
        """
        staged: Path | None = None
        descriptor = None
        if self._crew.rank == 0 and error is None:
            try:
                staged, descriptor = folders.stage(self.root, step)
            except UserError as refused:
                error = refused
        try:
            return self.root / settle(self._crew, error, staged.name if staged else ""), descriptor
        except BaseException:
            if staged is not None:
                folders.delete(staged)
            if descriptor is not None:
                os.close(descriptor)
            raise

    def _joined(self) -> BaseException | None:
        """The error of this rank's writer, once that has ended."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        return error

    def _snapshot(self, held: Mapping[str, Pieces]) -> dict[str, Pieces]:
        """Copy into the buffers of the save before: new memory would cost a page fault for every 4 KiB."""
        before, self._copies = self._copies, {}
        result = {}
        for name, pieces in held.items():
            boxes = []
            for number, box in enumerate(pieces.boxes):
                tensor, copy = box.tensor, before.get((name, number))
                if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
                    copy = torch.empty(tensor.shape, dtype=tensor.dtype)
                self._copies[name, number] = copy.copy_(tensor.detach())
                boxes.append(Box(box.offset, copy))
            result[name] = Pieces(pieces.shape, pieces.dtype, tuple(boxes))
        return result

    def _work(self, staged: Path, descriptor: int | None, state: State, trainer: bytes) -> None:
        try:
            write(staged, state, trainer, self._crew, self._max_file_bytes)
            if self._crew.rank == 0:
                self.last = folders.path_of(self.root, state.step)
                folders.retain(self.root, state.step, *self._keep)
        except BaseException as error:
            self._error = error
        finally:
            if descriptor is not None:
                os.close(descriptor)
        try:  # all writers end together: whoever waits for one in a collective waits for none that still writes
            self._crew.part(staged.name)
        except Broken as error:
            self._error = self._error or error
