"""A save that is killed, or refused by the system, at each of its calls: a reader finds the old state or the new."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pytest

from tozan import files
from tozan.checkpoint import Saver, load, newest, save, verify
from tozan.errors import UserError

CALLS = ("open", "write", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir")


@pytest.fixture
def tmp_path(tmp_path):
    """In memory where that exists: a killed process loses nothing that the kernel has, so real disks only cost time."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


class Kernel:
    """Stands between the saver and the system: counts the calls that change something, and acts before one of them."""

    def __init__(self, act=lambda call, args: None, at: int = 0) -> None:
        self.act, self.at = act, at
        self.log: list[tuple[str, str]] = []
        self.names: dict[int, str] = {}

    def install(self, patch) -> Kernel:
        for call in CALLS:
            patch.setattr(os, call, self.wrap(call, getattr(os, call)))
        patch.setattr(files, "exchange", self.wrap("exchange", files.exchange))
        return self

    def wrap(self, call, real):
        def wrapped(*args, **kwargs):
            if call == "open" and not args[1] & os.O_CREAT:
                descriptor = real(*args, **kwargs)
                self.names[descriptor] = str(args[0])
                return descriptor
            self.log.append((call, self.names.get(args[0], "") if isinstance(args[0], int) else str(args[0])))
            if len(self.log) == self.at:
                self.act(call, args)
            result = real(*args, **kwargs)
            if call == "open":
                self.names[result] = str(args[0])
            return result

        return wrapped


def in_child(work) -> int:
    """Run `work` in a forked child (torch is imported already) and return its exit status."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(process, 0)[1]


def die(call, args):
    os.kill(os.getpid(), signal.SIGKILL)


def die_with_half_of_it_done(call, args):
    if call == "write":
        os.pwrite(args[0], bytes(args[1])[: len(args[1]) // 2], os.lseek(args[0], 0, os.SEEK_END))
    die(call, args)


def problems_of(call):
    try:
        call()
    except UserError as error:
        return error.problems
    return []


def check_old_or_new(root: Path, before: list, after: list, equal) -> bool:
    """Each visible checkpoint is whole and one of those expected. Returns whether the new state is there."""
    folders = sorted(path for path in root.iterdir() if path.name.startswith("step-"))
    found = [load(path) for path in folders]
    for state in found:
        assert any(equal(state, good) for good in [*before, *after])
    best = load(newest(root, pytest.fail))
    assert any(equal(best, good) for good in (before[-1], after[-1]))
    return equal(best, after[-1])


@pytest.mark.parametrize("act", [die, die_with_half_of_it_done])
@pytest.mark.parametrize("scene", ["next step, old one deleted", "same step", "same step, no atomic exchange"])
def test_killed_before_each_call_of_a_save(tmp_path, monkeypatch, make_state, equal, scene, act):
    old, new = make_state(1), make_state(2)
    if scene != "next step, old one deleted":
        old = type(old)(2, old.tensors, old.meta, old.files)
    if scene.endswith("no atomic exchange"):
        monkeypatch.setattr(files, "exchange", lambda one, other: False)

    def work(root, kernel):
        with pytest.MonkeyPatch.context() as patch:
            kernel.install(patch)
            with Saver(root, keep_last=1, background=False) as saver:
                saver.save(new)

    save(tmp_path / "whole", old)
    undisturbed = Kernel()
    work(tmp_path / "whole", undisturbed)
    calls = [call for call, _ in undisturbed.log]
    assert len(calls) > 25
    places = [at for at, call in enumerate(calls, 1) if act is die or call == "write"]  # half is of a write alone
    outcomes = []
    for at in [*places, len(calls) + 1]:
        root = tmp_path / str(at)
        save(root, old)
        status = in_child(partial(work, root, Kernel(act, at)))
        assert os.WTERMSIG(status) == (signal.SIGKILL if at <= len(calls) else 0)
        with Saver(root, keep_last=1):
            assert not [path.name for path in root.iterdir() if not path.name.startswith("step-")]
        outcomes.append(check_old_or_new(root, [old], [new], equal))
        shutil.rmtree(root)
    assert status == 0
    assert outcomes == sorted(outcomes), "old before the rename, new ever after"
    assert outcomes[0] is False
    assert outcomes[-1] is True


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_refused_at_each_call_of_a_save(tmp_path, make_state, equal, number):
    """An error names the file, the old state stays, and the same saver can save again when the trouble is over."""

    def refuse(call, args):
        raise OSError(number, os.strerror(number))

    refused = 0
    for at in range(1, 200):
        root = tmp_path / str(at)
        save(root, make_state(1))
        saver = Saver(root, keep_last=1)
        with pytest.MonkeyPatch.context() as patch:
            kernel = Kernel(refuse, at).install(patch)
            for problem in problems_of(partial(saver.save, make_state(2))) + problems_of(saver.wait):
                refused += 1
                assert str(root) in problem.where
                assert errno.errorcode[number] in problem.what
        check_old_or_new(root, [make_state(1)], [make_state(2)], equal)
        saver.save(make_state(3))
        saver.close()
        assert equal(load(newest(root, pytest.fail)), make_state(3))
        Saver(root).close()
        assert [path.name for path in root.iterdir()] == ["step-00000003"]
        shutil.rmtree(root)
        if len(kernel.log) < at:
            break
    assert refused > 20


def test_a_folder_that_vanishes_is_named_and_not_made_anew(tmp_path, make_state):
    root = tmp_path / "checkpoints"
    with Saver(root) as saver:
        shutil.rmtree(root)
        with pytest.raises(UserError, match="ENOENT") as caught:
            saver.save(make_state(1))
    assert str(root) in caught.value.problems[0].where
    assert not root.exists()


def test_everything_is_synced_before_the_rename_and_the_rename_before_any_deletion(tmp_path, make_state):
    save(tmp_path, make_state(1))
    with pytest.MonkeyPatch.context() as patch:
        kernel = Kernel().install(patch)
        with Saver(tmp_path, keep_last=1, background=False) as saver:
            saver.save(make_state(2))
    log = kernel.log
    published = next(at for at, (call, _) in enumerate(log) if call == "rename")
    staged = log[published][1]
    for at, (call, name) in enumerate(log[:published]):
        if call == "write":
            assert ("fsync", name) in log[at:published]
        if call == "open":
            assert ("fsync", staged) in log[at:published]
    created = [name for call, name in log[:published] if call == "open"]
    assert created[-1].endswith("manifest.json")
    assert log[published + 1] == ("fsync", str(tmp_path))
    assert not [call for call, _ in log[: published + 2] if call in ("unlink", "rmdir", "replace")]


@pytest.mark.parametrize("step", [1, 2])
def test_strace_sees_no_call_that_the_tests_above_do_not(tmp_path, make_state, step):
    """The layer that kills and refuses counts the same calls as the kernel's own tracer."""
    counted = {"openat": "open", "unlinkat": "unlink", "renameat2": "exchange"}
    tool = shutil.which("strace")
    if tool is None:
        pytest.skip("strace is not installed")

    def work(root):
        with Saver(root, keep_last=1, background=False) as saver:
            saver.save(make_state(step))

    traced, logged, go = tmp_path / "traced", tmp_path / "logged", os.pipe()
    for root in (traced, logged):
        save(root, make_state(1))
    process = os.fork()
    if process == 0:
        try:
            os.read(go[0], 1)
            work(traced)
        finally:
            os._exit(0)
    words = [tool, "-f", "-y", "-p", str(process), "-o", str(tmp_path / "out")]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as tracer:
        attached = tracer.stderr.readline()
        os.write(go[1], b"x")
        os.waitpid(process, 0)
    assert "attached" in attached
    lines = [line.split(maxsplit=1)[1] for line in (tmp_path / "out").read_text().splitlines() if str(traced) in line]
    harmless = ("close(", "newfstatat(", "fstat(", "stat(", "statx(", "getdents64(", "fcntl(", "flock(", "lseek(")
    harmless += ("lstat(", "readlink(", "access(", "statfs(")
    changing = [
        line.partition("(")[0]
        for line in lines
        if not line.startswith(harmless) and not (line.startswith("openat(") and "O_CREAT" not in line)
    ]
    with pytest.MonkeyPatch.context() as patch:
        kernel = Kernel().install(patch)
        work(logged)
    assert Counter(counted.get(call, call) for call in changing) == Counter(call for call, _ in kernel.log)


def test_a_full_disk(tmp_path, make_state, equal):
    """A real one: a file system of 64 KiB, mounted in a name space of its own where that is allowed."""
    script = f"""
import sys, pathlib
sys.path.insert(0, {str(Path(__file__).parent)!r})
from conftest import state_of, same
from tozan.checkpoint import Saver, load, newest
from tozan.errors import UserError
root = pathlib.Path({str(tmp_path)!r})
saved, saver = 0, Saver(root, keep_last=99)
for step in range(1, 99):
    saver.save(state_of(step))
    try:
        saver.wait()
        saved = step
    except UserError as error:
        print(error)
        break
assert 0 < saved < 20, saved
assert same(load(newest(root, sys.exit)), state_of(saved))
assert sorted(path.name for path in root.iterdir()) == [f"step-{{step:08d}}" for step in range(1, saved + 1)]
"""
    space = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--map-root-user"]
    mount = f"mount -t tmpfs -o size=64k none {tmp_path}"
    if subprocess.run([*space, "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("this system does not let us mount a small file system")
    shell = f'{mount} && exec "$0" -c "$1"'
    done = subprocess.run([*space, "sh", "-c", shell, sys.executable, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "No space left on device" in done.stdout
    assert f"{tmp_path}/.saving-step-" in done.stdout


def test_killed_at_random_moments(tmp_path, make_state, equal):
    """20 real SIGKILLs of a process that saves all the time; each time it goes on from what it finds."""
    chance = random.Random(1)
    step = 0

    def work():
        with Saver(tmp_path, keep_last=2) as saver:
            start = newest(tmp_path, lambda problem: os._exit(3))
            at = load(start).step if start else 0
            while True:
                at += 1
                saver.save(make_state(at))

    for _ in range(20):
        process = os.fork()
        if process == 0:
            try:
                work()
            finally:
                os._exit(1)
        time.sleep(chance.uniform(0.02, 0.25))
        os.kill(process, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(process, 0)[1]) == signal.SIGKILL
        found = newest(tmp_path, pytest.fail)
        if found is None:
            continue
        state = load(found)
        assert equal(state, make_state(state.step))
        assert state.step >= step
        step = state.step
    assert step > 5
    for path in tmp_path.glob("step-*"):
        assert verify(path) == []


def test_what_a_living_process_stages_is_not_swept(tmp_path, make_state):
    ready, go = os.pipe(), os.pipe()

    def stop(call, args):
        os.write(ready[1], b"x")
        os.read(go[0], 1)

    process = os.fork()
    if process == 0:
        with pytest.MonkeyPatch.context() as patch:
            Kernel(stop, 9).install(patch)
            save(tmp_path, make_state(5))
        os._exit(0)
    os.read(ready[0], 1)
    with Saver(tmp_path) as saver:
        assert saver.swept == []
    assert newest(tmp_path, pytest.fail) is None
    os.write(go[1], b"x")
    assert os.waitpid(process, 0)[1] == 0
    assert newest(tmp_path, pytest.fail) == tmp_path / "step-00000005"


def test_without_locks_the_owner_in_the_name_decides(tmp_path, monkeypatch):
    def no_locks(*args):
        raise OSError(errno.ENOTSUP, "no locks")

    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    host = os.uname().nodename
    gone = os.fork()
    if gone == 0:
        os._exit(0)
    os.waitpid(gone, 0)
    names = {
        f".saving-step-00000001.{host}.{os.getpid()}.ab": False,
        f".saving-step-00000001.{host}.{gone}.ab": True,
        f".saving-step-00000001.elsewhere.{gone}.ab": False,
        ".deleting-step-00000001.ab": True,
    }
    for name in names:
        (tmp_path / name).mkdir()
    with Saver(tmp_path) as saver:
        assert {path.name for path in saver.swept} == {name for name, swept in names.items() if swept}
