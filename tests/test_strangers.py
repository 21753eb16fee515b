"""Files of strangers (configs, machines, tokenizers, results, manifests) that are junk, bombs, pipes or devices."""

import json
import os
import random
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tozan import files
from tozan.bench import result
from tozan.checkpoint import huggingface_config
from tozan.config import load as load_config
from tozan.data.manifest import Manifest
from tozan.data.tokenizer import Tokenizer
from tozan.errors import UserError
from tozan.planner import machine

DEEP = 100_000
JUNK = {
    "nothing": b"",
    "zeros": bytes(5000),
    "noise": random.Random(1).randbytes(20_000),
    "not unicode": b"\xff\xfe\xfa",
    "deep lists": b"[" * DEEP,
    "deep tables": b'{"a":' * DEEP,
    "deep TOML": b"a = " + b"[" * DEEP,
    "deep keys": b".".join([b"a"] * DEEP) + b" = 1",
    "twice": b'{"format": "tozan bench", "format": 1}',
    "twice in TOML": b"version = 1\nversion = 2",
    "long number": b"1" * 1_000_000,
    "long number in TOML": b"version = " + b"1" * 100_000,
    "infinite": b'{"version": Infinity}',
    "surrogate": b'{"format": "\\ud800", "model": {"vocab": {"\\ud800": 1}}}',
    "a list": b"[1, 2]",
    "code": b"!!python/object/apply:os.system ['touch /tmp/tozan-ran']",
    "merges that are not there": b'{"version":"1.0","model":{"type":"BPE","vocab":{"a":0},"merges":["x y"]}}',
    "huge ids": b'{"version":"1.0","model":{"type":"BPE","vocab":{"a":4294967295},"merges":[]}}',
}


def manifest(path: Path) -> None:
    target = path.parent / "set"
    target.mkdir(exist_ok=True)
    if os.path.lexists(target / "manifest.json"):
        (target / "manifest.json").unlink()
    path.rename(target / "manifest.json")
    Manifest.read(target)


READERS = {
    "config": lambda path: load_config(path),
    "machine": lambda path: machine.load(str(path)),
    "tokenizer": Tokenizer.load,
    "result": result.read,
    "data": manifest,
    "hugging face": huggingface_config.read_json,
}


@contextmanager
def little_memory() -> Iterator[None]:
    """A huge allocation fails instead of taking the machine down."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("junk", JUNK)
def test_junk_is_refused_by_name_in_little_time_and_memory(kind, junk, tmp_path):
    path = tmp_path / f"strange-{kind.replace(' ', '-')}.toml"
    path.write_bytes(JUNK[junk])
    begin, problems = time.monotonic(), None
    with little_memory():
        try:
            READERS[kind](path)
        except UserError as error:
            problems = error.problems
    if problems is None:  # any object will do for this one
        assert kind == "hugging face"
        assert isinstance(json.loads(JUNK[junk]), dict)
    else:
        assert any(str(tmp_path) in problem.where for problem in problems), problems
    assert time.monotonic() - begin < 30
    assert not Path("/tmp/tozan-ran").exists()


@pytest.mark.parametrize("kind", READERS)
def test_no_reader_waits_at_a_pipe_or_swallows_a_device(kind, tmp_path):
    for number, make in enumerate((os.mkfifo, lambda path: path.symlink_to("/dev/zero"), os.mkdir)):
        path = tmp_path / f"{number}.toml"
        make(path)
        with little_memory(), pytest.raises(UserError):
            READERS[kind](path)


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(OSError, match="at most 1,000"):
        files.read(path, 1000)
    assert files.read(Path(__file__)) == Path(__file__).read_bytes()
