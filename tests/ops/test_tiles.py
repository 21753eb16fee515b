"""Products on AMX tiles, on any machine: their machine code with AMX in software; and who may use tiles for what."""

import ctypes
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tile_trap
import torch

from tozan.ops import fused, native, products, tiles, trial
from tozan.ops.tiles import Verdict

INTRINSICS = """
#include <immintrin.h>
void all(void *p) {
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
    _tile_release();
}
"""


@pytest.fixture
def library():
    """Products on tiles that can be called."""
    found = tile_trap.library("products")
    with tile_trap.trapped() as counts:
        yield found
    assert tile_trap.HERE or counts["multiplied"] > 0


def instructions(path: Path) -> set[str]:
    """Those of AMX in a file, with their registers."""
    text = subprocess.run(["objdump", "-d", str(path)], capture_output=True, text=True, check=True).stdout
    found = (line.split("\t")[-1] for line in text.splitlines())
    return {" ".join(one.split()) for one in found if "tmm" in one or one.startswith(("tilerelease", "ldtilecfg"))}


@pytest.mark.parametrize("task", tiles.TASKS)
def test_the_machine_code_is_that_of_the_compilers_intrinsics(tmp_path, task):
    source, made = tmp_path / "all.c", tmp_path / "all.o"
    source.write_text(INTRINSICS)
    subprocess.run(["cc", "-O1", "-mamx-tile", "-mamx-bf16", "-c", str(source), "-o", str(made)], check=True)
    ours, theirs = instructions(Path(tile_trap.library(task)._name)), instructions(made)
    assert {one for one in ours if not one.startswith(("tileload", "tilestore", "ldtilecfg"))} == theirs
    assert len([one for one in theirs if one.startswith("tdpbf16ps")]) == 4
    loads = {one.rpartition(",")[2] for one in ours if one.startswith("tileloadd")}
    assert loads == {f"%tmm{number}" for number in range(8)}
    assert {one.split()[1].partition(",")[0] for one in ours if one.startswith("tilestored")} == {
        f"%tmm{number}" for number in range(4)
    }


def test_the_trial_finds_nothing_wrong(library):
    """Every layout, type and setting; several parts along k; bits the same on any number of threads."""
    assert trial.wrong(library, torch.get_num_threads(), ((37, 53, 41), (33, 20, 450))) == ""


def test_large_results_go_past_the_caches_with_the_same_bits(library):
    a, b = torch.randn(1050, 3).bfloat16(), torch.randn(3, 1024)
    made = []
    for stream in (True, False):
        trial.set_to(library, 12, stream)
        made.append(trial.product(library, a, b, torch.bfloat16))
    assert torch.equal(*made)
    assert (made[0] - a.double() @ b.bfloat16().double()).norm() <= 2**-8 * made[0].norm()


def test_what_is_not_finite_stays_in_its_row_and_column(library):
    a, b = torch.ones(30, 20).bfloat16(), torch.ones(20, 40)
    a[3, 4], b[5, 6] = float("nan"), float("inf")
    y = trial.product(library, a, b, torch.float32)
    assert y[3].isnan().all()
    assert y[torch.arange(30) != 3, 6].isinf().all()
    assert (y[torch.arange(30) != 3][:, torch.arange(40) != 6] == 20).all()


def test_the_trial_times_three_directions_by_setting(library):
    theirs, ours = trial.seconds(library, (40, 33, 35), rounds=1)
    assert len(theirs) == len(trial.DIRECTIONS)
    assert [setting for setting, _ in ours] == list(trial.SETTINGS)
    assert all(0 < second < 10 for _, seconds in ours for second in seconds)


class Spoilt:
    """A library that makes one wrong element."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library

    def __getattr__(self, name: str) -> object:
        return getattr(self.library, name)

    def __getitem__(self, name: str) -> object:
        def call(*arguments: object) -> None:
            self.library[name](*arguments)
            ctypes.c_float.from_address(arguments[9].value).value = 1e3

        return call


def test_the_trial_sees_a_wrong_element(library, monkeypatch):
    assert trial.wrong(Spoilt(library), 1, ((37, 53, 41),)).startswith("wrong by ")
    monkeypatch.setattr(trial, "SIZES", ((37, 53, 41),))
    broken = Spoilt(library)
    broken.tiles_permitted = lambda: 1
    found = tiles.judge(trial.run(broken, 2), 2)
    assert (found.use, found.failed) == (False, True)
    broken.tiles_permitted = lambda: 0
    assert trial.run(broken, 2) == {"wrong": "Linux lets processes use no AMX tiles"}


@pytest.mark.parametrize(("fastest", "use"), [(1.0, True), (1.98, False), (3.0, False)])
def test_only_a_faster_kernel_is_used_as_it_is_fastest(fastest, use):
    said = {
        "wrong": "",
        "rival": "PyTorch's rate",
        "directions": trial.DIRECTIONS,
        "torch": [1.0, 1.0, 4.0],
        "tiles": [[[12, True], [4.0, 4.0, 4.0]], [[99, False], [fastest] * 3]],
    }
    found = tiles.judge(json.loads(json.dumps(said)), 2)
    assert (found.use, found.failed, found.steps, found.stream) == (use, False, 99, False)
    assert f"weight gradient {4 / fastest:.2f}; 2 threads" in found.why


def test_one_process_tries_and_all_decide_alike(tmp_path, monkeypatch):
    tried = []
    monkeypatch.setattr(tiles, "_try", lambda path, task: tried.append(path) or Verdict(True, f"trial {len(tried)}"))
    path = tmp_path / "library.so"
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(tiles.decide, [path] * 4, ["products"] * 4)) == {Verdict(True, "trial 1")}
    (kept,) = tmp_path.glob("*.json")
    assert torch.__version__ in kept.name
    kept.write_text("{")
    assert tiles.decide(path, "products").why == "trial 2"
    kept.unlink()
    assert tiles.decide(path, "products").why == "trial 3"


@pytest.mark.parametrize(
    ("interpreter", "why"),
    [
        ("kill -ILL $$", "its trial died of SIGILL"),
        ("echo no such thing >&2; exit 1", "its trial failed: no such thing"),
        ("echo hello", "its trial failed: no word"),
    ],
)
def test_a_trial_that_dies_harms_nobody(tmp_path, monkeypatch, interpreter, why):
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\n{interpreter}\n")
    path.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(path))
    assert tiles.decide(tmp_path / "library.so", "products") == Verdict(False, why, failed=True)


def test_the_trial_runs_as_a_process():
    found = tiles._try(Path(tile_trap.library("products")._name), "products")
    if tile_trap.HERE:
        assert not found.failed
    else:
        assert found == Verdict(False, "Linux lets processes use no AMX tiles", failed=True)


@pytest.fixture
def pretend(monkeypatch):
    """A processor with tiles, as far as anyone asks."""
    assert native.status() == native.COMPILED
    monkeypatch.setattr(fused, "on_vectors", lambda: None)
    monkeypatch.setattr(tiles, "_units", lambda: tiles.UNITS)
    monkeypatch.setattr(native, "products_pay", lambda: False)
    tiles._found.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    tiles._found.cache_clear()


def test_a_verdict_is_obeyed_and_told(pretend):
    library = tile_trap.library("products")
    pretend.setattr(native, "open_library", lambda source: (library, ""))
    pretend.setattr(library, "tiles_permitted", lambda: 1, raising=False)
    pretend.setattr(tiles, "decide", lambda path, task: Verdict(True, "1.30 times PyTorch's rate"))
    assert tiles.library("products") is library
    assert products.pays(torch.bfloat16)
    assert not products.pays(torch.float32)
    assert tiles.trouble("products") == ""
    assert products.status(torch.bfloat16).startswith(
        "bf16 by tozan on AMX tiles: 1.30 times PyTorch's rate; others by"
    )
    assert products.status(torch.float32) == products.status(None) == "PyTorch's libraries"
    tiles._found.cache_clear()
    pretend.setattr(tiles, "decide", lambda path, task: Verdict(False, "0.90 times PyTorch's rate"))
    assert not products.pays(torch.bfloat16)
    assert tiles.trouble("products") == ""  # slower is nothing to warn of
    assert products.status(torch.bfloat16) == "PyTorch's libraries; tozan's on AMX tiles: 0.90 times PyTorch's rate"


def test_attention_has_a_verdict_of_its_own(pretend):
    library, q = tile_trap.library("attention"), torch.zeros(1, 1, 130, 64).bfloat16()
    pretend.setattr(native, "open_library", lambda source: (library, ""))
    pretend.setattr(library, "tiles_permitted", lambda: 1, raising=False)
    found = {"products": Verdict(False, "0.90 times"), "attention": Verdict(True, "1.80 times the rate of blocks")}
    pretend.setattr(tiles, "decide", lambda path, task: found[task])
    assert fused.library(torch.bfloat16) is library
    assert fused.usable(q)
    assert not fused.usable(q.float())
    assert not products.pays(torch.bfloat16)
    assert fused.status(torch.bfloat16).startswith("bf16 by tozan on AMX tiles: 1.80 times the rate of blocks; others")
    assert fused.status(torch.float32) == fused.status(None) == "PyTorch"
    try:
        tiles.allow(["products"])
        assert not fused.usable(q)
        assert fused.status(torch.bfloat16).endswith("other ranks of this run do not use AMX tiles")
        tiles.allow(tiles.TASKS)
        native.choose("plain")
        assert not fused.usable(q)
        assert fused.status(torch.bfloat16) == "plain PyTorch: asked for"
    finally:
        tiles.allow(tiles.TASKS)
        native.choose("auto")


@pytest.mark.parametrize("task", tiles.TASKS)
@pytest.mark.parametrize("case", ["refused", "not compiled", "wrong"])
def test_what_should_serve_and_does_not_is_warned_of(pretend, case, task):
    library = tile_trap.library(task)
    opened = (None, "no compiler") if case == "not compiled" else (library, "")
    pretend.setattr(native, "open_library", lambda source: opened)
    pretend.setattr(library, "tiles_permitted", lambda: 0, raising=False)
    decided = Verdict(case != "wrong", "wrong by 1", failed=case == "wrong")
    pretend.setattr(tiles, "decide", lambda path, task: decided)
    assert tiles.library(task) is None
    why = {"refused": "Linux lets this process", "not compiled": "no compiler", "wrong": "wrong by 1"}[case]
    assert tiles.trouble(task).startswith(f"{task} on AMX tiles: not used, {why}")
