"""Files that are whole or absent: synced writes, atomic renames, and locks that die with their process.

Every call to the kernel that changes a file system goes through the `os` module (also inside `pathlib` and
`shutil`) or `exchange`, so that a test
can count the calls, fail any of them, or end the process before any of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import os
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tozan.errors import Problem, UserError

PIECE = 1 << 20
"""Bytes handled at once: small enough that a piece is still in a core's L2 when it is hashed a second time."""

LARGEST = 1 << 28
"""Bytes of the largest file that is read whole: a manifest of some million tensors or documents."""

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def problem(error: OSError, path: Path, doing: str) -> Problem:
    """What to tell the user about a failed call to the operating system.

    Args:
        error: what the call raised.
        path: the file or folder it was about.
        doing: what was tried, as in "write", "read", "rename".
    """
    what = f"cannot {doing}: {error.strerror or error} ({errno.errorcode.get(error.errno or 0, 'unknown error')})"
    fix = {
        errno.ENOSPC: "free space on that file system, or point the run at another",
        errno.EDQUOT: "your quota on that file system is used up: delete files or point the run at another",
        errno.EROFS: "the file system is mounted read-only: remount it, or point the run at another",
        errno.EACCES: "the folder's permissions forbid it: change them, or point the run at another",
        errno.EIO: "the device failed: look into the system's log, and point the run at another file system",
        errno.ENOENT: "the folder is gone: was it deleted, or its file system unmounted?",
    }.get(error.errno or 0, "")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        with contextlib.suppress(OSError):
            what += f", {shutil.disk_usage(_existing(path)).free:,} bytes free"
    return Problem(str(path), what, fix)


@contextlib.contextmanager
def naming(path: Path, doing: str) -> Iterator[None]:
    """Turn an OSError inside the block into a UserError that names `path`."""
    try:
        yield
    except OSError as error:
        raise UserError(problem(error, path, doing)) from error


def read(path: Path, limit: int = LARGEST) -> bytes:
    """The bytes of a plain file of at most `limit` bytes: what a stranger may have put there neither blocks nor grows.

    Raises:
        OSError: it is no plain file, or larger, or cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe without a writer would block
    with os.fdopen(descriptor, "rb") as file:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            raise OSError(errno.EINVAL, "not a plain file", str(path))
        if facts.st_size > limit:
            raise OSError(errno.EFBIG, f"{facts.st_size:,} bytes; such a file has at most {limit:,}", str(path))
        return file.read(limit + 1)


class Writer:
    """A new file being written: counts its bytes and hashes them on the way.

    Args:
        path: must not exist.
        hashed: False where the caller hashes what it writes.

    Attributes:
        bytes: bytes written so far.
        sha256: running hash of those bytes.
    """

    def __init__(self, path: Path, hashed: bool = True) -> None:
        """Create the file.

        Raises:
            OSError: it exists, or the file system refuses.
        """
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._hashed = hashed
        self.bytes = 0
        self.sha256 = hashlib.sha256()

    def write(self, piece: bytes | memoryview) -> None:
        """Append bytes."""
        view = memoryview(piece)
        if self._hashed:
            self.sha256.update(view)
        self.bytes += len(view)
        while len(view):
            view = view[os.write(self._descriptor, view) :]

    def finish(self) -> None:
        """Wait until the bytes are on the device, and close."""
        try:
            os.fsync(self._descriptor)
        finally:
            self.close()

    def close(self) -> None:
        """Close without syncing; harmless the second time."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


@contextlib.contextmanager
def create(path: Path, hashed: bool = True) -> Iterator[Writer]:
    """Write a new file whose bytes are on the device when the block ends.

    Args:
        path: must not exist.
        hashed: False where the caller hashes what it writes.

    Raises:
        UserError: the file exists or cannot be written; names it.
    """
    with naming(path, "write"):
        writer = Writer(path, hashed)
        try:
            yield writer
            writer.finish()
        finally:
            writer.close()


def sync_folder(path: Path) -> None:
    """Wait until a folder's entries are on the device.

    Raises:
        UserError: the folder is gone or cannot be synced.
    """
    with naming(path, "sync"):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        except OSError as error:
            # Some network file systems have no fsync for folders: their entries are synchronous anyway.
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            os.close(descriptor)


def replace(path: Path, data: bytes) -> None:
    """Write a small file so that readers see either the old bytes or the new, also after a crash.

    Raises:
        UserError: it cannot be written; the old file is then still there.
    """
    staged = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with create(staged) as writer:
            writer.write(data)
        with naming(path, "replace"):
            staged.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            staged.unlink()
        raise
    sync_folder(path.parent)


def exchange(one: Path, other: Path) -> bool:
    """Swap the names of two files or folders of one file system in one step (Linux `renameat2`).

    Returns:
        False where the kernel or the file system has no such call; nothing has happened then.

    Raises:
        OSError: the swap failed for another reason.
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(one))


def lock(folder: Path) -> int | None:
    """Lock a folder for this process, for as long as it lives or until the descriptor is closed.

    Returns:
        The open descriptor, or None if another holds the lock.

    Raises:
        OSError: the folder is gone, or the file system knows no locks.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@contextlib.contextmanager
def scratch(prefix: str, under: Path | None = None) -> Iterator[Path]:
    """A new folder that is removed at the end of the block, with those that killed processes have left behind.

    Left behind is a folder of that prefix on which no process holds a lock, and that nobody has changed for an hour: a
    new one is locked a moment after it was made.

    Args:
        prefix: begins its name.
        under: where; default: the system's folder for temporary files.
    """
    under = Path(under or tempfile.gettempdir())
    for old in under.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):  # another user's, or another process is faster
            if time.time() - old.stat().st_mtime > 3600 and (held := lock(old)) is not None:
                shutil.rmtree(old, ignore_errors=True)
                os.close(held)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=under) as name:
        held = None
        with contextlib.suppress(OSError):  # a file system without locks
            held = lock(Path(name))
        try:
            yield Path(name)
        finally:
            if held is not None:
                os.close(held)


def _existing(path: Path) -> Path:
    """The path, or its nearest parent that exists."""
    return next((p for p in (path, *path.parents) if p.exists()), Path("/"))
