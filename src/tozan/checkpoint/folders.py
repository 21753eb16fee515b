"""The folder of a run's checkpoints: names, what may be swept, and what is kept. Torch-free."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import socket
from pathlib import Path

from tozan import files
from tozan.errors import Problem, UserError

_STEP = re.compile(r"step-([0-9]{8,})")
_STAGING = ".saving-"
_TRASH = ".deleting-"
_REPLACED = ".replaced-"
_STAGED_BY = re.compile(r"\.saving-step-[0-9]+\.(?P<host>.*)\.(?P<process>[0-9]+)\.[0-9a-f]+")


def path_of(root: Path, step: int) -> Path:
    """Where the checkpoint of a step lies: `root/step-00000100`."""
    return root / f"step-{step:08d}"


def step_of(folder: Path) -> int | None:
    """The step in a checkpoint folder's name, or None if it is not such a name."""
    match = _STEP.fullmatch(folder.name)
    return int(match[1]) if match else None


def steps(root: Path) -> dict[int, Path]:
    """The checkpoint folders under `root` by step, in ascending order; whether they are whole is not looked at.

    Raises:
        UserError: `root` cannot be listed.
    """
    with files.naming(root, "list"):
        found = {step: path for path in root.iterdir() if (step := step_of(path)) is not None and path.is_dir()}
    return dict(sorted(found.items()))


def stage(root: Path, step: int) -> tuple[Path, int | None]:
    """Make and lock a new folder, under a name that no reader takes for a checkpoint.

    Returns:
        The folder, and the lock's descriptor; None where the file system has no locks.

    Raises:
        UserError: it cannot be made.
    """
    while True:
        name = f"{_STAGING}step-{step:08d}.{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}"
        folder = root / name
        with files.naming(folder, "make"):
            folder.mkdir()
            try:
                descriptor = files.lock(folder)
            except FileNotFoundError:
                continue
            except OSError:
                return folder, None
            # A sweep at this very moment may have locked or deleted the folder before we could: take another.
            if descriptor is not None and folder.is_dir():
                return folder, descriptor
            if descriptor is not None:
                os.close(descriptor)


def publish(staged: Path, final: Path) -> None:
    """Give a finished, synced folder its real name; whatever had that name is deleted afterwards.

    Raises:
        UserError: the rename failed, and `final` is as it was; or it could not be made to last, and all is left
            as it is.
    """
    with files.naming(final, "rename"):
        try:
            replaced = _rename_over(staged, final)
        except OSError:
            delete(staged)
            raise
    files.sync_folder(final.parent)
    if replaced is not None:
        delete(replaced)


def _rename_over(staged: Path, final: Path) -> Path | None:
    """Rename, and return where that lies now which had the name before."""
    if not os.path.lexists(final):
        staged.rename(final)
        return None
    if files.exchange(staged, final):
        return staged
    # Without an atomic exchange the old one steps aside first; `sweep` puts it back after a crash in between.
    replaced = final.with_name(f"{_REPLACED}{final.name}.{secrets.token_hex(4)}")
    final.rename(replaced)
    try:
        staged.rename(final)
    except OSError:
        replaced.rename(final)
        raise
    return replaced


def delete(folder: Path) -> None:
    """Delete a folder, of which a crash leaves either all or nothing that a reader would look at.

    Failing to delete is no reason to stop a run: what is left is swept at the next start.
    """
    trash = folder
    with contextlib.suppress(OSError, UserError):
        if not folder.name.startswith("."):
            trash = folder.with_name(f"{_TRASH}{folder.name}.{secrets.token_hex(4)}")
            folder.rename(trash)
            files.sync_folder(folder.parent)
        if trash.is_dir() and not trash.is_symlink():
            shutil.rmtree(trash, ignore_errors=True)
        else:
            trash.unlink()


def sweep(root: Path) -> list[Path]:
    """Delete what killed saves and deletions left, except folders that a living process is writing to.

    Returns:
        What was swept.

    Raises:
        UserError: `root` cannot be listed.
    """
    swept = []
    with files.naming(root, "list"):
        entries = sorted(root.iterdir())
    for path in entries:
        if path.name.startswith(_REPLACED):
            final = root / path.name.removeprefix(_REPLACED).rpartition(".")[0]
            if step_of(final) is not None and not final.exists():
                with contextlib.suppress(OSError):
                    path.rename(final)
                continue
        if path.name.startswith((_STAGING, _TRASH, _REPLACED)) and not _in_use(path):
            delete(path)
            swept.append(path)
    return swept


def retain(root: Path, step: int, keep_last: int, keep_every: int) -> list[Path]:
    """Delete old checkpoints after that of `step` is complete.

    Those beyond `step` (damaged, or from before a run was set back) are left alone and do not count, so that
    neither they nor anything else can push out the checkpoint just written.

    Args:
        root: the folder of checkpoints.
        step: the step just saved.
        keep_last: how many of the newest to keep, this one included; at least 1.
        keep_every: also keep steps that are a multiple of this; 0 keeps none.

    Returns:
        The deleted folders.
    """
    past = [(number, path) for number, path in steps(root).items() if number <= step]
    doomed = [path for number, path in past[: -max(keep_last, 1)] if not (keep_every and number % keep_every == 0)]
    for path in doomed:
        delete(path)
    return doomed


def missing(path: Path) -> UserError:
    """The error for a path that holds no checkpoint: says what it does hold."""
    if not path.exists():
        what = "does not exist"
    elif not path.is_dir():
        what = "is a file; a checkpoint is a folder"
    else:
        inside = sorted(entry.name for entry in path.iterdir())[:5]
        what = f"holds no checkpoint (no step-00000100, no manifest.json); it holds {', '.join(inside) or 'nothing'}"
    return UserError(Problem(str(path), what, "give a run folder, its checkpoints folder, or one checkpoint"))


def _in_use(folder: Path) -> bool:
    """Whether a living process writes to a staging folder, as far as can be told."""
    if not folder.name.startswith(_STAGING):
        return False
    try:
        descriptor = files.lock(folder)
    except FileNotFoundError:
        return False
    except OSError:
        return _owner_lives(folder)
    if descriptor is None:
        return True
    os.close(descriptor)
    return False


def _owner_lives(folder: Path) -> bool:
    """Where locks do not work: is the process in the folder's name alive? On other hosts it is taken to be."""
    match = _STAGED_BY.fullmatch(folder.name)
    if match is None or match["host"] != socket.gethostname():
        return match is not None
    try:
        os.kill(int(match["process"]), 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
