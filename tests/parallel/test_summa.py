"""SUMMA products against torch.matmul in fp64: values and both gradients, on grids of any side and depth."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import spawn

from tozan.comm import Axis, Mesh, collectives
from tozan.layout import Layout
from tozan.parallel.summa import Grid, summa, summa_nt, summa_tn

FORMS = {
    # name: (product, its reference, shapes of A and B for an M×K by K×N product)
    "nn": (summa, lambda a, b: a @ b, lambda m, k, n: ((m, k), (k, n))),
    "nt": (summa_nt, lambda a, b: a @ b.T, lambda m, k, n: ((m, k), (n, k))),
    "tn": (summa_tn, lambda a, b: a.T @ b, lambda m, k, n: ((k, m), (k, n))),
}


def grids(side, depth):
    scheme = "2.5d" if depth > 1 else "2d"
    mesh = Mesh.create(Layout(tp=side * side * depth, scheme=scheme, tp_depth=depth), timeout_s=20)
    return Grid(mesh["tp_row"], mesh["tp_col"]), mesh["tp_depth"]


def block(x, grid):
    rows = x.chunk(grid.side, 0)[grid.row.index]
    return rows.chunk(grid.side, 1)[grid.column.index].clone().requires_grad_()


def near(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def products(side, depth, cases):
    """Each case on this rank: blocks of C, dA and dB equal those of the whole product."""
    grid, deep = grids(side, depth)
    for form, m, k, n, seed in cases:
        generator = torch.Generator().manual_seed(seed)
        product, reference, shapes = FORMS[form]
        shape_a, shape_b = shapes(m * side, k * side, n * side)
        # Every grid of the stack has an A of its own and the same B.
        many = [torch.randn(shape_a, generator=generator, dtype=torch.float64) for _ in range(depth)]
        whole_a = many[deep.index].requires_grad_()
        whole_b = torch.randn(shape_b, generator=generator, dtype=torch.float64, requires_grad=True)
        expected = reference(whole_a, whole_b)
        weights = [torch.randn(expected.shape, generator=generator, dtype=torch.float64) for _ in range(depth)]
        total = sum((reference(a, whole_b) * w).sum() for a, w in zip(many, weights, strict=True))
        total.backward()

        a, b = block(whole_a.detach(), grid), block(whole_b.detach(), grid)
        c = product(a, b, grid)
        near(c, block(expected.detach(), grid))
        (c * block(weights[deep.index], grid)).sum().backward()
        near(a.grad, block(whole_a.grad, grid))
        near(collectives.all_reduce(b.grad, deep, name="depth"), block(whole_b.grad, grid))


case = st.tuples(st.sampled_from(sorted(FORMS)), *[st.integers(1, 9)] * 3, st.integers(0, 2**32))


@pytest.mark.parametrize(("side", "depth"), [(1, 1), (1, 2), (2, 1), (2, 2)])
@settings(max_examples=5, deadline=None)
@given(st.lists(case, min_size=1, max_size=8))
def test_products_and_gradients_equal_matmul(side, depth, cases):
    if side == depth == 1:
        products(side, depth, cases)
    else:
        spawn(side * side * depth, products, side, depth, cases)


def test_partial_sums_of_16_bit_blocks_are_kept_in_fp32():
    """One grid of one rank rounds once: the product is torch's own."""
    grid = Grid(Axis.single(), Axis.single())
    a, b = torch.randn(8, 16).bfloat16(), torch.randn(16, 4).bfloat16()
    assert torch.equal(summa(a, b, grid), a @ b)


def many_terms():
    """A·B of ones: 2 partial sums of 129 + 128 terms, which bf16 could not tell from 256."""
    grid, _ = grids(2, 1)
    a, b = torch.ones(1, 129), torch.ones(129, 1)
    return [summa(a, b, grid).item(), summa(a.bfloat16(), b.bfloat16(), grid).item()]


def test_fp32_sums_on_a_grid():
    assert all(found == [258.0, 258.0] for found in spawn(4, many_terms))


def volume(m, k, n, form):
    grid, _ = grids(2, 1)
    shape_a, shape_b = FORMS[form][2](m, k, n)
    a, b = (torch.randn(shape, requires_grad=True) for shape in (shape_a, shape_b))
    c = FORMS[form][0](a, b, grid)
    forward = grid.row.ledger.sum().bytes
    c.sum().backward()
    return forward, grid.row.ledger.sum().bytes - forward


@pytest.mark.parametrize("form", FORMS)
def test_bytes_are_those_of_the_panels(form):
    """Each form moves two of the three matrices once, its gradients the same two twice (Optimus, table 1)."""
    m, k, n = 3, 5, 7
    a, b, c = m * k, k * n, m * n
    moved = {"nn": a + b, "nt": b + c, "tn": a + c}
    found = spawn(4, volume, m, k, n, form)
    blocks = 2 * 2 * (2 - 1) * 4  # ranks × (q − 1), 4 bytes an element
    assert sum(forward for forward, _ in found) == blocks * moved[form]
    assert sum(backward for _, backward in found) == 2 * blocks * moved[form]


def test_misfit_blocks_are_refused():
    grid = Grid(Axis.single(), Axis.single())
    with pytest.raises(ValueError, match=r"\(2, 3\).* and \(4, 5\)"):
        summa(torch.ones(2, 3), torch.ones(4, 5), grid)
    with pytest.raises(ValueError, match="float64"):
        summa(torch.ones(2, 3), torch.ones(3, 5, dtype=torch.float64), grid)
    with pytest.raises(ValueError, match="square"):
        Grid(Axis.single(), Axis("tp_col", 2, 0, (0, 1)))
