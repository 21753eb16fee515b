import pytest
import torch
from ranks import RankError, spawn

from tozan.comm import Axis, Mesh
from tozan.comm import collectives as c
from tozan.comm.checks import MismatchError
from tozan.comm.mesh import TP_AXES
from tozan.layout import Layout, split


def inputs(size, shape, dtype, seed=0):
    """What every rank passes in; each rank makes all of them, so that it can compute the reference."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(size)]


def fold(tensors):
    """The sum in the order of the ranks: fp32 for 16-bit types, rounded once."""
    wide = torch.float32 if tensors[0].element_size() == 2 else tensors[0].dtype
    total = tensors[0].to(wide)
    for tensor in tensors[1:]:
        total = total + tensor.to(wide)
    return total.to(tensors[0].dtype)


def every_collective(size, dtype):
    axis = Mesh.create(Layout(dp=size), timeout_s=20)["dp"]
    xs = inputs(size, (5, size * 2, 3), dtype)
    total, mine = fold(xs), xs[axis.index]
    equal = torch.equal

    assert equal(c.all_reduce(mine.clone(), axis, ordered=True, name="a"), total)
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6}.get(dtype, 0.0)
    torch.testing.assert_close(c.all_reduce(mine.clone(), axis), total, rtol=tolerance, atol=tolerance)
    with_nan = mine.clone()
    with_nan[0, 0, 0] = float("nan") if axis.index == size - 1 else 1.0
    top = c.all_reduce(with_nan, axis, op="max")
    assert top[0, 0, 0].isnan()
    assert equal(top.flatten()[1:], torch.stack(xs).amax(0).flatten()[1:])

    for dim in range(3):
        part = split(mine.shape[dim], size, axis.index)
        own = total.narrow(dim, part.start, len(part))
        assert equal(c.reduce_scatter(mine, axis, dim), own)
        assert equal(c.all_gather(own, axis, dim, length=mine.shape[dim]), total)
        assert equal(c.all_gather(mine, axis, dim), torch.cat(xs, dim))
    assert equal(c.broadcast(mine.clone(), axis, size - 1), xs[size - 1])
    reduced = c.reduce(mine, axis, 1)
    assert equal(reduced, total if axis.index == 1 else torch.zeros_like(total))
    swapped = c.all_to_all(mine, axis, 1, 0)
    assert equal(swapped, torch.cat([x.chunk(size, 1)[axis.index] for x in xs], 0))
    assert equal(c.all_to_all(swapped, axis, 0, 1), mine)
    assert equal(c.shift(mine, axis), xs[axis.index - 1])
    assert equal(c.shift(mine, axis, -1), xs[(axis.index + 1) % size])
    if axis.index == 0:
        c.send(mine, axis, 1, tag=7)
    elif axis.index == 1:
        assert equal(c.recv(torch.empty_like(mine), axis, 0, tag=7), xs[0])
    c.barrier(axis)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [2, 3])
def test_every_collective_against_local_sums_in_rank_order(size, dtype):
    spawn(size, every_collective, size, dtype)


def chunked():
    axis = Mesh.create(Layout(dp=3), timeout_s=20)["dp"]
    parts = [5_000_000, 7, 3_000_001]
    xs = inputs(3, (sum(parts),), torch.float32)
    offset, own = sum(parts[: axis.index]), parts[axis.index]
    pieces = [x[offset : offset + own] for x in xs]
    into = torch.full((own,), 0.125)
    c.scatter_sum_async(xs[axis.index], axis, parts, into=into, first=False).wait()
    assert torch.equal(into, ((0.125 + pieces[0]) + pieces[1]) + pieces[2])
    c.scatter_sum_async(xs[axis.index], axis, parts, into=into).wait()
    assert torch.equal(into, fold(pieces))


def test_large_uneven_scatter_in_chunks_adds_in_rank_order():
    spawn(3, chunked)


def ledger(size):
    axis = Mesh.create(Layout(dp=size), timeout_s=20)["dp"]
    x = torch.zeros(size * 60)
    c.all_reduce(x, axis, name="sum")
    c.reduce_scatter(x, axis, name="scatter")
    c.all_gather(x, axis, name="gather")
    c.broadcast(x, axis, 1, name="cast")
    c.reduce(x, axis, 0, name="down")
    handle = c.all_reduce_async(x, axis, name="later")
    assert str(axis.ledger.oldest_open()).startswith("all_reduce 'later' (number 6 over dp: ranks 0, 1")
    handle.wait()
    assert axis.ledger.oldest_open() is None
    assert axis.ledger.sum(name="later").transfer > 0
    return {name: axis.ledger.sum(name=name).bytes for name in ("sum", "scatter", "gather", "cast", "down")}


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ledger_counts_the_bytes_of_the_published_formulas(size):
    buffer = size * 60 * 4
    counted = spawn(size, ledger, size)
    for rank, sent in enumerate(counted):
        assert sent["sum"] == 2 * buffer * (size - 1) // size
        assert sent["scatter"] == buffer * (size - 1) // size
        assert sent["gather"] == buffer * (size - 1)
        assert sent["down"] == buffer * (size - 1) // size + (buffer // size if rank else 0)
    assert sum(sent["cast"] for sent in counted) == buffer * (size - 1)


def axes():
    layout = Layout(dp=2, tp=4, scheme="2d", pp=1)
    mesh = Mesh.create(Layout(dp=2, tp=2), timeout_s=20)
    assert mesh["tp"].ranks == layout.group(mesh.rank, "tp")[: mesh["tp"].size] or mesh["tp"].size == 2
    x = torch.tensor([float(mesh.rank)])
    return (
        c.all_reduce(x.clone(), mesh["tp"]).item(),
        c.all_reduce(x.clone(), mesh["dp"]).item(),
        c.all_reduce(x.clone(), mesh.joined("dp", "cp")).item(),
        c.all_reduce(x.clone(), mesh.everyone).item(),
        mesh["pp"].group,
        [axis.ranks for axis in mesh.part(mesh.everyone, 2)],
    )


def test_axes_talk_to_the_ranks_that_the_layout_says():
    results = spawn(4, axes)
    assert [r[0] for r in results] == [1.0, 1.0, 5.0, 5.0]
    assert [r[1] for r in results] == [2.0, 4.0, 2.0, 4.0] == [r[2] for r in results]
    assert {r[3] for r in results} == {6.0}
    assert {r[4] for r in results} == {None}
    assert results[3][5] == [(2, 3), (1, 3)]


def swapped():
    axis = Mesh.create(Layout(dp=2), timeout_s=20, debug=True)["dp"]
    c.all_reduce(torch.zeros(3), axis, name="same")
    names = ["first", "second"] if axis.index == 0 else ["second", "first"]
    with pytest.raises(MismatchError, match=r"rank 1 starts 1: all_reduce 'second' \(3,\) torch.float32"):
        c.all_reduce(torch.zeros(3), axis, name=names[0])
    with pytest.raises(MismatchError, match="int32"):
        c.all_reduce(torch.zeros(3, dtype=torch.int32 if axis.index else torch.float32), axis, name="dtype")


def test_debug_mode_finds_swapped_operations_and_other_dtypes():
    spawn(2, swapped)


def test_an_axis_of_one_rank_is_the_identity_and_leaves_no_entry():
    mesh = Mesh.create(Layout())
    x = torch.randn(4)
    for result in (c.all_reduce(x, mesh["dp"]), c.all_gather(x, mesh["tp"]), c.reduce_scatter(x, Axis.single())):
        assert result is x
    assert not mesh.ledger.totals
    assert mesh["tp"].name == "tp"
    assert len(TP_AXES) == 3


def fail(rank_to_fail):
    if torch.distributed.get_rank() == rank_to_fail:
        raise KeyError("wrong")
    c.barrier(Mesh.create(Layout(dp=2), timeout_s=20)["dp"])


def test_an_error_of_one_rank_reaches_the_test_with_its_traceback():
    with pytest.raises(RankError, match=r"rank 1 ---(.|\n)*KeyError: 'wrong'"):
        spawn(2, fail, 1)


def test_a_layout_of_another_size_is_refused():
    with pytest.raises(ValueError, match="has 4 ranks, but the world has 1"):
        Mesh.create(Layout(dp=4))
