"""100 damaged checkpoints, and as many forged ones: the state that was saved, or an error that names a file.

Damage is what disks and wires do. A forger can also seal: she makes every checksum fit what she has written, so her
numbers may be loaded; but nothing may crash, run, leave the folder, or take more memory than the files' sizes ask for.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import shutil
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from tozan.checkpoint import load, newest, save, verify
from tozan.errors import UserError

ROOM = 1 << 30
"""Bytes that a process may take beyond what it has: a load of these few kilobytes needs next to nothing."""
DEEP = 100_000


@pytest.fixture
def folder(tmp_path, make_state):
    return save(tmp_path / "checkpoints", make_state(100))


@contextmanager
def little_memory():
    """Make a huge allocation fail instead of taking the machine down."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip(folder, chance):
    path = folder / chance.choice(names(folder))
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def cut(folder, chance):
    path = folder / chance.choice(names(folder))
    os.truncate(path, chance.randrange(path.stat().st_size))


def grow(folder, chance):
    path = folder / chance.choice(names(folder))
    data = path.read_bytes()
    at = chance.randrange(len(data) + 1)
    path.write_bytes(data[:at] + chance.randbytes(chance.randint(1, 5000)) + data[at:])


def swap(folder, chance):
    one, two = (folder / name for name in chance.sample(names(folder), 2))
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)


def remove(folder, chance):
    (folder / chance.choice(names(folder))).unlink()


def noise(folder, chance):
    path = folder / chance.choice(names(folder))
    path.write_bytes(chance.randbytes(chance.choice([0, 1, 8, 9, 4096])))


def link(folder, chance):
    path = folder / chance.choice(names(folder))
    path.unlink()
    path.symlink_to(chance.choice(["/etc/passwd", "/dev/zero", "..", "nowhere", path.name]))


DAMAGES = [flip, flip, flip, cut, cut, grow, swap, remove, noise, link]


def outcome(folder: Path, equal, states) -> str:
    """Load, verify and resume; returns what happened in a word.

    Raises:
        AssertionError: a state that nobody saved, an error that names nothing in the folder, or more than 20 seconds.
    """
    begin = time.monotonic()
    said = []
    try:
        state = load(folder)
        assert any(equal(state, good) for good in states), "loads wrong"
        word = "same"
    except UserError as error:
        said += error.problems
        word = "refused"
    found = verify(folder)
    assert bool(found) == (word == "refused"), found
    try:
        newest(folder.parent, said.append)
    except UserError as error:
        said += error.problems
    for problem in [*said, *found]:
        assert str(folder.parent) in problem.where, problem
        str(problem).encode()
    assert time.monotonic() - begin < 20
    return word


def test_100_damaged_checkpoints_load_right_or_are_refused_by_name(folder, tmp_path, make_state, equal):
    chance, words = random.Random(11), []
    for number in range(100):
        copy = Path(shutil.copytree(folder, tmp_path / str(number) / folder.name))
        DAMAGES[number % len(DAMAGES)](copy, chance)
        with little_memory():
            words.append(outcome(copy, equal, [make_state(100)]))
        shutil.rmtree(copy.parent)
    assert words.count("refused") >= 99, "nearly every damage is one"


def reseal(folder: Path, table: dict) -> None:
    """Write a manifest whose own checksum fits."""
    table.pop("checksum", None)
    body = json.dumps(table, indent=1).removesuffix("\n}") + ",\n"
    digest = hashlib.sha256(body.encode()).hexdigest()
    (folder / "manifest.json").write_text(f'{body} "checksum": "{digest}"\n}}\n')


def table_of(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def leaves(value, path=()):
    """Every place in a JSON value, as a path of keys."""
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from leaves(value[key], (*path, key))


LIES = [
    -1, 0, 1, 2**31, 2**63, 2**64, 10**30, 0.5, 1e308, "", "x" * 100_000, "../../../etc/passwd", "/etc/passwd", "a\0b",
    "\ud800", None, True, [], {}, [[]], [2**40, 2**40], ["F32"], {"a": {}}, "F32", "NaN",
]  # fmt: skip


def forge(folder: Path, chance: random.Random) -> None:
    """Put a lie in some place of the manifest, and seal it."""
    table = table_of(folder)
    place = chance.choice([path for path in leaves(table) if path and path != ("checksum",)])
    inside = table
    for key in place[:-1]:
        inside = inside[key]
    inside[place[-1]] = chance.choice(LIES)
    reseal(folder, table)


def header_lie(folder: Path, chance: random.Random) -> None:
    """Replace the header of a tensor file, with all checksums made to fit."""
    table = table_of(folder)
    name = chance.choice([name for name in table["files"] if name.endswith(".safetensors")])
    data = (folder / name).read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    place = chance.choice([path for path in leaves(header) if path])
    inside = header
    for key in place[:-1]:
        inside = inside[key]
    inside[place[-1]] = chance.choice(LIES)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    (folder / name).write_bytes(head + data[8 + size :])
    entry = table["files"][name]
    entry["bytes"] = len(head) + len(data) - 8 - size
    entry["sha256"] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    entry["header"] = {"bytes": len(head), "sha256": hashlib.sha256(head).hexdigest()}
    reseal(folder, table)


def raw(text: bytes):
    return lambda folder, chance: (folder / "manifest.json").write_bytes(text)


def trainer(text: bytes):
    def write(folder, chance):
        (folder / "trainer.json").write_bytes(text)
        table = table_of(folder)
        table["files"]["trainer.json"] |= {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
        reseal(folder, table)

    return write


def huge_header(folder, chance):
    """A tensor file that says its header is 2⁶³ bytes long."""
    table = table_of(folder)
    name = next(name for name in table["files"] if name.endswith(".safetensors"))
    data = (folder / name).read_bytes()
    (folder / name).write_bytes((2**63).to_bytes(8, "little") + data[8:])
    table["files"][name]["header"]["bytes"] = 2**63 + 8
    reseal(folder, table)


FORGERIES = [
    *[forge] * 56,
    *[header_lie] * 30,
    huge_header,
    raw(b"[" * DEEP),
    raw(b'{"a":' * DEEP),
    raw(b'{"format": 1, "format": 2}'),
    raw(b"1" * 10_000),
    raw(b"\xff\xfe"),
    trainer(b"[" * DEEP),
    trainer(b'{"step": ' + b"9" * 10_000 + b', "meta": {}}'),
    trainer(b'{"step": 1, "step": 2, "meta": {}}'),
    trainer(b"[]"),
    trainer(b'{"step": "x", "meta": []}'),
    trainer(b"\xff"),
]


def test_100_forged_checkpoints_crash_nothing_and_are_named(folder, tmp_path):
    chance, refused = random.Random(12), 0
    for number, damage in enumerate(FORGERIES):
        copy = Path(shutil.copytree(folder, tmp_path / str(number) / folder.name))
        damage(copy, chance)
        begin = time.monotonic()
        with little_memory():
            problems = verify(copy)
            for read, *arguments in ((load, copy), (newest, copy.parent, problems.append)):
                try:
                    read(*arguments)
                except UserError as error:
                    problems += error.problems
        assert all(str(copy.parent) in problem.where for problem in problems), (number, problems)
        assert time.monotonic() - begin < 20, number
        refused += bool(problems)
        shutil.rmtree(copy.parent)
    assert refused >= 80
