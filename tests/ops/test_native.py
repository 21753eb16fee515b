"""How kernels are compiled, kept, shared and done without."""

import ctypes
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tozan.ops import gelu, gelu_reference, native

PRETEND = 'while [ "$1" != -o ]; do shift; done; echo > "$2"'
"""What a compiler does that only makes a file."""


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """An empty cache, and a process that has loaded nothing yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native._load.cache_clear()
    yield tmp_path / "tozan" / "kernels"
    monkeypatch.undo()
    native._load.cache_clear()


def fake_compiler(tmp_path, text):
    path = tmp_path / "compiler"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o700)
    return str(path)


def test_those_that_start_together_compile_once(fresh, tmp_path, monkeypatch):
    log = tmp_path / "log"
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, f"echo x >> {log}; sleep 0.3; {PRETEND}"))
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(native.build, [fresh] * 4))
    assert len(paths) == 1
    assert log.read_text() == "x\n"
    assert [path for path in fresh.iterdir() if path.suffix != ".lock"] == list(paths)
    assert fresh.stat().st_mode & 0o077 == 0


def test_a_compiled_library_needs_no_compiler(fresh, monkeypatch):
    made = native.build(native.cache_folder())
    monkeypatch.setenv("CXX", "/nowhere/c++")
    assert native.build(native.cache_folder()) == made
    assert hasattr(ctypes.CDLL(str(made)), "gelu_bf16")


@pytest.mark.parametrize(
    ("compiler", "why"),
    [
        ("", "no C++ compiler"),
        ("/nowhere/c++", "No such file"),
        ("echo 'kernels.cpp:1: error: unheard of' >&2; exit 1", "error: unheard of"),
    ],
)
def test_without_a_compiler_pytorch_does_it(fresh, tmp_path, monkeypatch, compiler, why):
    if not compiler:
        monkeypatch.setattr(native.shutil, "which", lambda name: None)
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, compiler) if " " in compiler else compiler)
    assert native.status().startswith("plain PyTorch: ")
    assert why in native.status()
    x = torch.randn(100)
    assert torch.equal(gelu(x), gelu_reference(x))
    assert not list(fresh.glob("*.so"))


@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_a_folder_that_others_may_write_to_is_not_trusted(fresh, mode):
    fresh.mkdir(parents=True)
    fresh.chmod(mode)
    assert "others than this user may write there" in native.status()


def test_another_source_is_another_library(fresh, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, PRETEND))
    first = native.build(fresh)
    for header in native.SOURCE.parent.glob("*.h"):
        shutil.copy(header, tmp_path)
    changed = tmp_path / "kernels.cpp"
    changed.write_bytes(native.SOURCE.read_bytes() + b"\n")
    monkeypatch.setattr(native, "SOURCE", changed)
    assert native.build(fresh) != first


def test_there_is_one_pool_of_threads():
    """The library uses the OpenMP that PyTorch has loaded."""
    assert native.status() == native.COMPILED
    maps = Path("/proc/self/maps").read_text().splitlines()
    assert len({line.split()[-1] for line in maps if "libgomp" in line}) == 1
