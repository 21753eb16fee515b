"""What the ranks of a run share out and agree on: GPUs, of which this machine needs none, and AMX tiles."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from ranks import spawn

from tozan.comm import Mesh
from tozan.errors import UserError
from tozan.layout import Layout
from tozan.ops import tiles
from tozan.ops.tiles import Verdict
from tozan.train.machine import agree_on_tiles, choose_device, own_gpu


def test_ranks_of_a_machine_share_out_the_gpus_that_they_all_see():
    seen = [("a", ["x", "y"])] * 2 + [("b", ["u", "v"])] * 2
    assert [own_gpu(rank, seen) for rank in range(4)] == [0, 1, 0, 1]
    interleaved = [("a", ["x", "y"]), ("b", ["u", "v"])] * 2
    assert [own_gpu(rank, interleaved) for rank in range(4)] == [0, 0, 1, 1]
    given = [("a", ["x"]), ("a", ["y"])]  # by the launcher, to each its own
    assert [own_gpu(rank, given) for rank in range(2)] == [0, 0]
    assert own_gpu(1, [("a", []), ("b", [])]) is None


def test_more_ranks_than_gpus_are_refused_with_the_arithmetic_of_every_machine():
    seen = [("a", ["x", "y"])] * 3 + [("b", ["u", "v", "w"])] * 3
    with pytest.raises(UserError) as refused:
        own_gpu(0, seen)
    [problem] = refused.value.problems
    assert problem.what == "3 ranks on a, which has 2 GPUs: each needs one"
    assert problem.fix == 'use 3 nodes for 6 ranks, or set train.device = "cpu"'
    with pytest.raises(UserError, match="1 rank on b, which has 0 GPUs"):
        own_gpu(0, [("a", ["x"]), ("b", [])])


def _device(gpus):
    """What a rank of two chooses where there are so many GPUs."""
    chosen = []
    fakes = {
        "is_available": lambda: gpus > 0,
        "device_count": lambda: gpus,
        "get_device_properties": lambda number: SimpleNamespace(uuid=f"GPU-{number}"),
        "set_device": chosen.append,
    }
    with mock.patch.multiple(torch.cuda, **fakes):
        try:
            device = choose_device("auto", Mesh.create(Layout(dp=2)))
        except UserError as error:
            return str(error)
        return str(device), chosen, str(choose_device("auto"))


def test_each_rank_computes_on_a_gpu_of_its_own():
    assert spawn(2, _device, 2) == [("cuda:0", [0], "cuda"), ("cuda:1", [1], "cuda")]
    assert spawn(2, _device, 0) == [("cpu", [], "cpu")] * 2
    assert all("2 ranks on" in said and "has 1 GPU:" in said for said in spawn(2, _device, 1))


def _uses_tiles(able):
    """Whether this rank of two makes products and attention on tiles, if the ranks `able` could; what it warns of."""
    mesh = Mesh.create(Layout(dp=2))
    found = {"products": (object(), Verdict(True, "faster")) if mesh.rank in able else (None, None)}
    found["attention"] = (object(), Verdict(True, "faster"))
    with mock.patch.object(tiles, "_found", found.get):
        agree_on_tiles(mesh)
        said = tiles.library("products") is not None, tiles.trouble("products")
        assert tiles.library("attention") is not None
    tiles.allow(tiles.TASKS)
    return said


def test_all_ranks_make_products_on_tiles_or_none():
    """Nodes may differ in what they have measured, if they share no cache."""
    assert spawn(2, _uses_tiles, (0, 1)) == [(True, "")] * 2
    warning = "products on AMX tiles: not used, other ranks of this run do not use AMX tiles"
    assert spawn(2, _uses_tiles, (0,)) == [(False, warning), (False, "")]
    assert spawn(2, _uses_tiles, ()) == [(False, "")] * 2
