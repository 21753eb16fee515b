"""A small disk of its own for a folder: a tmpfs that can be full, read-only or gone. Needs root on Linux."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_FORM = ["-t", "tmpfs", "-o", "size=16m,mode=0700", "tozan-chaos"]
_PATIENCE = 2.0


class Disk:
    """The disk under a folder.

    Args:
        folder: where it is mounted.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._filler = folder, folder / ".filler"

    def fill(self, left: int) -> None:
        """Use up all space but `left` bytes."""
        with suppress(OSError), self._filler.open("wb") as file:
            free = os.statvfs(self._folder)
            os.posix_fallocate(file.fileno(), 0, max(1, free.f_bavail * free.f_frsize - left))

    def empty(self) -> None:
        """Give the space back."""
        self._filler.unlink(missing_ok=True)

    def read_only(self, on: bool) -> None:
        """Refuse all writing from now on, or allow it again.

        Raises:
            OSError: files stay open for writing, and the kernel waits for them.
        """
        end = time.monotonic() + _PATIENCE
        while not _mount("-o", f"remount,{'ro' if on else 'rw'}", str(self._folder)):
            if time.monotonic() > end:
                raise OSError(errno.EBUSY, "is in use", str(self._folder))

    def lose(self) -> None:
        """The disk is gone with all that was on it, under whoever uses it; another, empty one takes its place."""
        _unmount(self._folder)
        _mount(*_FORM, str(self._folder))


@contextmanager
def mounted(folder: Path) -> Iterator[Disk | None]:
    """A disk at `folder`, or None if none may be mounted; at the end its files lie in the folder itself."""
    folder.mkdir(parents=True)
    if not _mount(*_FORM, str(folder)):
        yield None
        return
    try:
        yield Disk(folder)
    finally:
        kept = folder.with_name(f"{folder.name}-kept")
        shutil.copytree(folder, kept)
        _unmount(folder)
        shutil.rmtree(folder)  # not empty if somebody wrote in the moment without a disk
        kept.rename(folder)


def _mount(*words: str) -> bool:
    if os.geteuid() or not shutil.which("mount"):
        return False
    return subprocess.run(["mount", *words], capture_output=True).returncode == 0


def _unmount(folder: Path) -> None:
    subprocess.run(["umount", "--lazy", str(folder)], capture_output=True, check=True)
