"""Layouts: ranks ↔ coordinates ↔ groups, and shards that tile what they cut."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tozan import layout
from tozan.layout import AXES, Layout

small = st.integers(1, 4)


@st.composite
def layouts(draw):
    scheme = draw(st.sampled_from(["1d", "2d", "2.5d"]))
    depth = draw(st.integers(1, 3)) if scheme == "2.5d" else 1
    tp = draw(small) if scheme == "1d" else depth * draw(st.integers(1, 3)) ** 2
    return Layout(draw(small), draw(small), draw(st.integers(1, 3)), tp, scheme, depth)


@given(layouts())
def test_coordinates_are_those_of_a_numpy_grid(mesh):
    grid = np.arange(mesh.world_size).reshape(tuple(mesh.sizes.values()))
    for rank in range(mesh.world_size):
        found = mesh.coordinates(rank)
        assert grid[tuple(found[axis] for axis in AXES)] == rank
        assert mesh.rank(**found) == rank


@given(layouts(), st.lists(st.sampled_from([*AXES, "tp"]), min_size=1, max_size=2, unique=True))
def test_groups_partition_the_ranks(mesh, axes):
    if "tp" in axes:
        axes = ["tp"]
    groups = list(mesh.groups(*axes))
    assert sorted(rank for group in groups for rank in group) == list(range(mesh.world_size))
    for group in groups:
        assert len(group) == np.prod([mesh.size(axis) for axis in axes])
        assert all(mesh.group(rank, *axes) == group for rank in group)


def test_tensor_neighbours_are_rank_neighbours():
    mesh = Layout(pp=2, dp=3, tp=4)
    assert mesh.group(5, "tp") == (4, 5, 6, 7)
    assert mesh.group(5, "dp") == (1, 5, 9)
    assert mesh.group(5, "pp") == (5, 17)
    assert mesh.group(5, "pp", "dp") == (1, 5, 9, 13, 17, 21)
    assert (mesh.stride("tp"), mesh.stride("dp"), mesh.stride("pp")) == (1, 4, 12)
    assert Layout(tp=8, scheme="2.5d", tp_depth=2).coordinates(5) == dict(zip(AXES, (0, 0, 0, 1, 0, 1), strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dp": 0}, "dp = 0"),
        ({"tp": 6, "scheme": "2d"}, "tp = 6 is not tp_depth 1 × q²"),
        ({"tp": 4, "tp_depth": 2}, "belongs to scheme 2.5d"),
    ],
)
def test_refuses_meshes_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        Layout(**arguments)


def test_refuses_ranks_and_axes_that_are_not_there():
    with pytest.raises(ValueError, match="rank 8 is not"):
        Layout(dp=8).coordinates(8)
    with pytest.raises(ValueError, match="no mesh axis 'ep'"):
        Layout().size("ep")
    with pytest.raises(ValueError, match="dp = 2 is outside"):
        Layout(dp=2).rank(dp=2)


@given(st.integers(0, 200), st.integers(1, 30))
def test_split_cuts_as_numpy_does(length, parts):
    cuts = [list(layout.split(length, parts, index)) for index in range(parts)]
    assert cuts == [list(part) for part in np.array_split(np.arange(length), parts)]


@given(st.integers(1, 60), st.integers(1, 6), st.integers(1, 4))
def test_layers_are_all_there_in_order(layers, stages, chunks):
    if layers < stages * chunks:
        with pytest.raises(ValueError, match="cannot fill"):
            layout.split_layers(layers, stages, chunks)
        return
    cut = layout.split_layers(layers, stages, chunks)
    virtual = [cut[v % stages][v // stages] for v in range(stages * chunks)]
    assert [block for part in virtual for block in part] == list(range(layers))
    sizes = [len(part) for part in virtual]
    assert max(sizes) - min(sizes) <= 1
    assert sizes[-1] == min(sizes)


@given(st.integers(1, 200), st.integers(1, 8))
def test_zigzag_covers_the_sequence_and_balances_causal_work(tokens, parts):
    pieces = [layout.split_sequence(tokens, parts, index) for index in range(parts)]
    assert sorted(t for pair in pieces for piece in pair for t in piece) == list(range(tokens))
    if tokens % (2 * parts) == 0:
        assert len({sum(t for piece in pair for t in piece) for pair in pieces}) == 1


HEADS = st.sampled_from([(8, 8), (8, 2), (12, 4), (16, 1), (6, 3), (12, 12)])


@given(layouts(), HEADS, st.sampled_from(["vocab", "position", "norm", "qkv", "col", "row"]), st.booleans())
def test_shards_tile_every_parameter(mesh, heads, role, vector):
    """Every element is held by as many ranks of a tensor-parallel group as there are copies, none is left out."""
    size, width = 2, heads[0] * 2
    outputs = {"qkv": (heads[0] + 2 * heads[1]) * size, "vocab": 37, "position": 11, "col": 4 * width}.get(role, width)
    shape = (outputs,) if vector or role == "norm" else (outputs, 4 * width if role == "row" else width)
    held = np.zeros(shape, int)
    try:
        for rank in mesh.group(0, "tp"):
            indices = layout.shard(role, shape, mesh, mesh.coordinates(rank), heads)
            flat = [np.concatenate([np.arange(part.start, part.stop) for part in dim]) for dim in indices]
            held[np.ix_(*flat)] += 1
            assert layout.count(indices) == np.prod([len(dim) for dim in flat])
    except ValueError:
        assert role == "qkv"
        return
    assert held.min() >= 1
    if role != "qkv":
        assert held.min() == held.max()


def test_grouped_heads_stay_with_what_they_read():
    assert layout.split_heads(32, 8, 4, 1) == (range(8, 16), range(2, 4))
    assert layout.split_heads(32, 8, 16, 3) == (range(6, 8), range(1, 2))
    with pytest.raises(ValueError, match="12 ranks cannot share 8"):
        layout.split_heads(32, 8, 12, 0)


def test_qkv_rows_of_one_rank():
    rows = layout.shard("qkv", (16, 8), Layout(tp=2), {"tp_row": 0, "tp_col": 1}, (4, 2))[0]
    assert rows == (range(4, 8), range(10, 12), range(14, 16))


def test_zero_stages_are_those_of_the_paper():
    """Rajbhandari et al., arXiv 1910.02054, figure 1: 7.5B parameters, 64 ranks, mixed precision, K = 12."""
    sizes = [sum(layout.zero_bytes(7_500_000_000, stage, 64, 2, 2, 12).values()) / 1e9 for stage in range(4)]
    assert sizes == pytest.approx([120, 31.4, 16.6, 1.9], abs=0.05)
