"""Attention on AMX tiles, on any machine: its machine code with AMX in software, against fp64."""

import ctypes
import json
import runpy
from importlib.util import find_spec

import pytest
import tile_trap
import torch

from tozan.ops import causal_attention, fused, tiles, trial_attention
from tozan.ops.trial_attention import Heads

from .test_attention import inputs, outcome


@pytest.fixture
def library():
    """Attention on tiles that can be called."""
    found = tile_trap.library("attention")
    threads = torch.get_num_threads()
    with tile_trap.trapped() as counts:
        yield found
    torch.set_num_threads(threads)
    assert tile_trap.HERE or counts["multiplied"] > 0


@pytest.mark.parametrize(
    "shape",
    [
        Heads(1, 1, 1, 31, 32),
        Heads(2, 3, 1, 33, 40),
        Heads(1, 2, 2, 130, 64),
        Heads(1, 4, 2, 65, 80),
        Heads(1, 2, 1, 129, 128),
        Heads(1, 1, 1, 40, 200),
        Heads(1, 1, 1, 530, 64),
    ],
)
def test_equals_fp64_with_the_same_bits_on_any_number_of_threads(library, shape):
    """Output and gradients; heads of many sizes, ragged and grouped; threads that share a head and that do not."""
    assert trial_attention.wrong(library, 5, [shape]) == ""


def test_bits_depend_on_no_other_head(library):
    given = trial_attention.operands(Heads(2, 4, 2, 70, 32))
    all_heads = trial_attention.Kernel(library, given).made(2)
    few = tuple(t[1:, first:] for t, first in zip(given, (2, 1, 1, 2), strict=True))
    some = trial_attention.Kernel(library, few).made(1)
    assert all(torch.equal(one[1:, -one.shape[1] // 2 :], other) for one, other in zip(all_heads, some, strict=True))


def test_autograd_runs_on_tiles(library, monkeypatch):
    monkeypatch.setattr(fused, "library", lambda dtype: library)
    monkeypatch.setattr(fused, "usable", lambda q: True)
    tensors = inputs(torch.bfloat16, 45, 4, 2, 48, batch=1)
    q, k, v = (t.detach() for t in tensors)
    dy = torch.randn(q.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).bfloat16()
    for found, expected in zip(outcome(causal_attention, tensors), trial_attention.exact(q, k, v, dy), strict=True):
        assert (found - expected).norm() <= trial_attention.BOUND * expected.norm()


def test_a_lone_token_has_its_value_and_no_gradient_of_scores(library):
    _, k, v, dy = given = trial_attention.operands(Heads(1, 2, 1, 1, 64))
    y, dq, dk, dv = trial_attention.Kernel(library, given).made(1)
    assert torch.equal(y, v.expand_as(y))
    assert max(dq.abs().max(), dk.abs().max()) <= 1e-6 * dy.norm() * v.norm() * k.norm()  # terms that cancel
    assert (dv - dy.double().sum(1, keepdim=True)).norm() <= 2**-7 * dv.norm()


def test_nan_and_large_scores_stay_where_they_are(library):
    q, k, v, dy = trial_attention.operands(Heads(1, 1, 1, 300, 32))
    q, k = q * 30, (k * torch.linspace(0.1, 30, 300)[:, None]).bfloat16()
    found = trial_attention.Kernel(library, (q, k, v, dy)).made(1)
    assert all(t.isfinite().all() for t in found)
    assert (found[0] - trial_attention.exact(q, k, v, dy)[0]).norm() <= 5e-3 * found[0].norm()
    k[0, 0, 20] = float("nan")
    y = trial_attention.Kernel(library, (q, k, v, dy)).made(1)[0]
    assert y[0, 0, :20].isfinite().all()
    assert y[0, 0, 20:].isnan().all()


class Spoilt:
    """A library that makes one wrong element of the output."""

    def __init__(self, library: ctypes.CDLL, permitted: int) -> None:
        self.library, self.tiles_permitted = library, lambda: permitted

    def __getitem__(self, name: str) -> object:
        def call(*arguments: object) -> None:
            self.library[name](*arguments)
            if name == "attention_bf16":
                ctypes.c_uint16.from_address(arguments[4]._obj.p).value = 0x447A  # 1,000

        return call


def test_the_trial_sees_a_wrong_element_and_a_refusal(library, monkeypatch):
    monkeypatch.setattr(trial_attention, "SHAPES", (Heads(1, 2, 1, 33, 40),))
    found = tiles.judge(trial_attention.run(Spoilt(library, 1), 2), 2)
    assert (found.use, found.failed) == (False, True)
    assert found.why.startswith("wrong by ")
    assert "in output of 2 heads of 40, 33 tokens" in found.why
    assert trial_attention.run(Spoilt(library, 0), 2) == {"wrong": "Linux lets processes use no AMX tiles"}


def test_the_trial_says_in_one_line_what_it_found(monkeypatch, capsys):
    if tile_trap.HERE:
        pytest.skip("a whole trial; `test_the_trial_runs_as_a_process` runs that of products")
    monkeypatch.setattr("sys.argv", ["trial_attention", tile_trap.library("attention")._name, "1"])
    runpy.run_path(find_spec(tiles._TRIALS["attention"]).origin, run_name="__main__")
    assert json.loads(capsys.readouterr().out) == {"wrong": "Linux lets processes use no AMX tiles"}


def test_the_trial_times_both_directions_beside_batched_products(library):
    theirs, ours = trial_attention.seconds(library, Heads(1, 1, 1, 40, 32), rounds=1)
    assert all(0 < second < 10 for second in (*theirs, *ours))
    said = {"wrong": "", "rival": "the rate of batched products", "directions": trial_attention.DIRECTIONS}
    for gain, use in ((1.02, False), (1.5, True)):
        found = tiles.judge({**said, "torch": [gain, 3 * gain], "tiles": [[None, [1.0, 3.0]]]}, 1)
        assert (found.use, found.failed) == (use, False)
        assert found.why.startswith(f"{gain:.2f} times the rate of batched products (forward {gain:.2f}, backward")
