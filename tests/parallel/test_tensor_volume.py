"""The ledger counts what the published formulas say, and the manual's table is made from these formulas."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from ranks import spawn
from tensor_cases import batch

from tozan import models
from tozan.comm import Mesh
from tozan.layout import Layout
from tozan.models.arithmetic import Shape
from tozan.parallel import apply as door
from tozan.parallel import volume

GPT = Shape("gpt2", 1, 16, 4, 4, 64, 24, 8)
LLAMA = Shape("llama", 1, 16, 4, 2, 24, 24, 8, tied=False)


def counted(layout, sequence, shape):
    """Bytes that this rank sends in a forward pass, a backward pass and the sum of gradients."""
    mesh = Mesh.create(layout, timeout_s=30)
    model = models.create(shape, 1)
    placements = door.apply(model, mesh, sequence=sequence)
    total = [0]
    loss = model(*batch(shape))
    total.append(mesh.ledger.sum().bytes)
    loss.backward()
    total.append(mesh.ledger.sum().bytes)
    door.synchronize(dict(model.named_parameters()), placements, mesh)
    total.append(mesh.ledger.sum().bytes)
    return [after - before for before, after in pairwise(total)]


def blocks(layout, sequence, shape):
    """The same for one block: a model of three blocks less one of two."""
    three, two = (counted(layout, sequence, replace(shape, layers=layers)) for layers in (3, 2))
    return [more - fewer for more, fewer in zip(three, two, strict=True)]


@pytest.mark.parametrize("shape", [GPT, LLAMA], ids=["gpt2", "llama"])
@pytest.mark.parametrize(
    ("layout", "sequence"),
    [
        (Layout(tp=2), False),
        (Layout(tp=2), True),
        (Layout(tp=4, scheme="2d"), False),
        (Layout(tp=2, scheme="2.5d", tp_depth=2), False),
        (Layout(tp=8, scheme="2.5d", tp_depth=2), False),
    ],
)
def test_the_ledger_counts_the_formula(layout, sequence, shape):
    ranks = spawn(layout.tp, blocks, layout, sequence, shape)
    expected = volume.block_volume(shape, layout, 8, sequence_parallel=sequence)
    mean = [sum(rank[i] for rank in ranks) / layout.tp for i in range(3)]
    assert mean == [expected.forward, expected.backward, expected.step]


def test_published_formulas():
    """Megatron: 4·(p−1)/p·bsh each way. Optimus: (7bsh + 12h²) in blocks of 1/q², twice as much backward."""
    shape = replace(GPT, width=64, mlp_width=256, sequence=32)
    b, s, h = 8, 32, 64
    for p in (2, 4, 8):
        for sequence in (False, True):
            found = volume.block_volume(shape, Layout(tp=p), b, sequence_parallel=sequence, element_bytes=2)
            assert found.forward == found.backward == 4 * (p - 1) * b * s * h * 2 / p
    for q in (2, 4, 8):
        found = volume.block_volume(shape, Layout(tp=q * q, scheme="2d"), b, element_bytes=2)
        products = (q - 1) * (7 * b * s * h + 12 * h * h) * 2 / q**2
        norms = 2 * 2 * b * s / q * 4
        assert found.forward == products + (q - 1) * norms
        assert found.backward == 2 * products + 2 * (q - 1) / q * norms


def test_the_manual_shows_the_table():
    manual = Path(__file__).parents[2] / "docs" / "tensor-parallel.md"
    assert volume.table() in manual.read_text(encoding="utf-8")


def shared_entrance():
    """gate and up read one tensor: one transfer each way serves both."""
    mesh = Mesh.create(Layout(tp=2), timeout_s=30)
    model = models.create(LLAMA, 1)
    door.apply(model, mesh)
    x = torch.randn(2, 8, 16, requires_grad=True)
    model.blocks[0].mlp(x).sum().backward()
    return mesh.ledger.sum(name="tp enter").count, mesh.ledger.sum(name="tp leave").count


def test_layers_that_read_the_same_tensor_share_a_transfer():
    assert spawn(2, shared_entrance) == [(1, 1)] * 2
