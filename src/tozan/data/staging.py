"""A folder that appears whole or not at all: filled under another name, synced, then renamed."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tozan.errors import Problem, UserError
from tozan.files import exchange, sync_folder

_LOCK = "lock"


@contextmanager
def staging(out: Path) -> Iterator[Path]:
    """Lends a scratch folder beside `out` that is gone afterwards, whatever happens.

    What a killed process left behind is cleared by the next one: the owner of a scratch folder holds a lock in it,
    and the lock dies with its process.

    Args:
        out: where the finished folder will stand.

    Yields:
        An empty folder on the same file system.

    Raises:
        UserError: the disk is full, or the folder may not be written.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{out.name}.building-"
        for leftover in out.parent.glob(f"{prefix}*"):
            if not _owned(leftover):
                shutil.rmtree(leftover, ignore_errors=True)
        scratch = Path(tempfile.mkdtemp(prefix=prefix, dir=out.parent))
        lock = os.open(scratch / _LOCK, os.O_CREAT | os.O_RDWR)
    except OSError as error:
        raise _told(out, error) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (scratch / "files").mkdir()
        yield scratch
    except OSError as error:
        raise _told(out, error) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        os.close(lock)


def _owned(scratch: Path) -> bool:
    """Whether a living process works in a scratch folder."""
    try:
        lock = os.open(scratch / _LOCK, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(lock)
    return False


def publish(folder: Path, out: Path, *, overwrite: bool) -> None:
    """Gives a filled folder its final name; from then on it is complete and durable.

    Args:
        folder: the filled folder; its files are on disk already.
        out: the final name, on the same file system.
        overwrite: replace what stands there.
    """
    sync_folder(folder)
    if not (overwrite and out.exists()):
        folder.rename(out)
    elif not exchange(folder, out):  # without an atomic exchange there is a moment in which neither has the name
        out.rename(folder.parent / "replaced")
        folder.rename(out)
    sync_folder(out.parent)


def _told(out: Path, error: OSError) -> UserError:
    """Says what happened to the disk, and what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(out.parent).free
        rule = f"the disk is full ({free / 1e6:,.1f} MB free); nothing was written"
        fix = "make room for about 3 bytes for each byte of text, or choose a folder on a larger disk"
        return UserError(Problem(str(out), rule, fix))
    about = f"{error.filename}: " if error.filename else ""
    return UserError(Problem(str(out), f"cannot be written: {about}{error.strerror or error}; nothing was written"))
