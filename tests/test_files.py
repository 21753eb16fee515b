"""Files that are whole or absent."""

from __future__ import annotations

import errno
import hashlib
import os
import signal

import pytest

from tozan import files
from tozan.errors import UserError


def test_create_writes_counts_and_hashes(tmp_path):
    path = tmp_path / "a"
    with files.create(path) as out:
        out.write(b"one")
        out.write(memoryview(b""))
        out.write(memoryview(b"two"))
    assert path.read_bytes() == b"onetwo"
    assert (out.bytes, out.sha256.hexdigest()) == (6, hashlib.sha256(b"onetwo").hexdigest())
    with pytest.raises(UserError, match="EEXIST"), files.create(path):
        pass


def test_short_writes_are_continued(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, bytes(data[:3])))
    with files.create(tmp_path / "a") as out:
        out.write(b"0123456789")
    assert (tmp_path / "a").read_bytes() == b"0123456789"


def test_replace_is_old_or_new_and_leaves_nothing_behind(tmp_path, monkeypatch):
    path = tmp_path / "a"
    files.replace(path, b"old")
    files.replace(path, b"new")
    assert path.read_bytes() == b"new"

    def full(descriptor, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(UserError, match="No space left") as caught:
        files.replace(path, b"newer")
    assert "bytes free" in caught.value.problems[0].what
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a"]  # noqa: PTH208


def test_exchange_swaps_folders(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if files.exchange(tmp_path / "a", tmp_path / "b"):
        assert (tmp_path / "a" / "b").exists()
        assert (tmp_path / "b" / "a").exists()
    with pytest.raises(FileNotFoundError):
        files.exchange(tmp_path / "a", tmp_path / "gone")


def test_a_lock_is_held_by_one_and_dies_with_its_process(tmp_path):
    ready = os.pipe()
    process = os.fork()
    if process == 0:
        files.lock(tmp_path)
        os.write(ready[1], b"x")
        signal.pause()
    os.read(ready[0], 1)
    assert files.lock(tmp_path) is None
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    descriptor = files.lock(tmp_path)
    assert descriptor is not None
    os.close(descriptor)


def test_scratch_removes_itself_and_what_killed_processes_have_left(tmp_path):
    old = {name: tmp_path / f"made-{name}" for name in ("left", "held", "new")}
    for folder in (*old.values(), tmp_path / "other"):
        folder.mkdir()
        (folder / "file").write_text("x")
        if folder.name != "made-new":
            os.utime(folder, (0, 0))
    held = files.lock(old["held"])
    with files.scratch("made-", tmp_path) as folder:
        assert {path.name for path in tmp_path.iterdir()} == {"made-held", "made-new", "other", folder.name}
        assert files.lock(folder) is None
        (folder / "file").write_text("x")
    os.close(held)
    assert not folder.exists()
