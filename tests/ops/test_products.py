"""Matrix products and linear layers against torch in fp64, compiled and plain."""

import contextlib
import itertools

import pytest
import tile_trap
import torch
import torch.nn.functional as F

from tozan.ops import linear, native, product, products, tiles

TYPES = {"f": torch.float32, "b": torch.bfloat16}
SIZES = [(24, 32, 16), (37, 53, 41), (25, 70, 131), (100, 33, 2), (200, 1, 1)]
"""Rows, columns and summed dim: whole tiles, and what is left of them at every edge."""


@pytest.fixture(params=["own", "tiles", "plain"])
def kernel(request, monkeypatch):
    """The kernels, though they may not pay here, and PyTorch; on tiles, what is not in bf16 is PyTorch's, too."""
    if request.param == "own" and native._products() is None:
        pytest.skip("matrix products need AVX-512 with bf16")
    monkeypatch.setattr(native, "products_pay", lambda: request.param == "own")
    library = tile_trap.library("products") if request.param == "tiles" else None
    monkeypatch.setattr(tiles, "library", lambda task: library if task == "products" else None)
    with tile_trap.trapped() if library else contextlib.nullcontext():
        yield request.param


def matrix(rows, columns, dtype, transposed, seed=0):
    generator = torch.Generator().manual_seed(seed)
    size = (columns, rows) if transposed else (rows, columns)
    made = torch.randn(size, generator=generator).to(dtype)
    return made.T if transposed else made


@pytest.mark.parametrize("variant", native.PRODUCTS)
@pytest.mark.parametrize("size", SIZES)
def test_equal_torch_in_fp64(kernel, variant, size):
    left, right, result = (TYPES[letter] for letter in variant)
    m, n, k = size
    for first, second in itertools.product([False, True], repeat=2):
        a, b = matrix(m, k, left, first), matrix(k, n, right, second, seed=1)
        bias = torch.linspace(-1, 1, n)
        exact = a.double() @ b.to(left).double()
        bound = 2**-8 if torch.bfloat16 in (result, left if kernel == "plain" else result) else 1e-6
        for found, expected in (
            (product(a, b, left, result), exact),
            (product(a, b, left, result, bias=bias), exact + bias.double()),
        ):
            assert found.dtype == result
            assert (found - expected).norm() <= bound * (exact.norm() + bias.norm())
        if result == torch.float32:
            there = matrix(m, n, torch.float32, False, seed=2)
            into = there.clone()
            assert product(a, b, left, result, into=into) is into
            assert (into - there - exact).norm() <= bound * (exact.norm() + there.norm())


def test_an_empty_sum_is_zero(kernel):
    assert not product(torch.ones(30, 0), torch.ones(0, 5), torch.float32).any()
    assert product(torch.ones(30, 4), torch.ones(4, 0), torch.float32).shape == (30, 0)


def test_what_is_not_finite_stays_in_its_row_and_column(kernel):
    a, b = torch.ones(30, 20), torch.ones(20, 40)
    a[3, 4], b[5, 6] = float("nan"), float("inf")
    y = product(a, b, torch.float32)
    assert (~y.isfinite()).nonzero()[:, 0].eq(3).logical_or((~y.isfinite()).nonzero()[:, 1].eq(6)).all()
    assert y[3].isnan().all()
    assert y[torch.arange(30) != 3, 6].isinf().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_depend_neither_on_position_nor_on_threads(kernel, dtype):
    """Rows and columns may be cut anywhere: so may a layout cut samples, and a weight by outputs."""
    if kernel == "plain" or (kernel, dtype) == ("tiles", torch.float32):
        return  # PyTorch promises no such thing
    a, b = matrix(150, 77, dtype, False), matrix(77, 210, dtype, True, seed=1)
    threads = torch.get_num_threads()
    whole = product(a, b, dtype)
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        assert torch.equal(product(a, b, dtype), whole)
        assert torch.equal(product(a[30:91], b[:, 50:99], dtype), whole[30:91, 50:99])
    torch.set_num_threads(threads)


def outcome(function, dtype, inputs, autocast):
    x, weight, bias = (t.detach().to(dtype).requires_grad_() for t in inputs)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = function(x, weight, bias)
    dy = torch.linspace(-2, 2, y.numel(), dtype=torch.float64).bfloat16().to(y.dtype).view(y.shape)
    found = (y, *torch.autograd.grad(y, (x, weight, bias), dy))
    assert [t.dtype for t in found[1:]] == [dtype] * 3
    return [t.double() for t in found]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("tokens", [5, 9])
def test_linear_equals_torch_in_fp64(kernel, autocast, tokens):
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(*size, generator=generator) for size in ((4, tokens, 40), (70, 40), (70,))]
    if autocast:
        inputs = [t.bfloat16().float() for t in inputs]
    exact = outcome(F.linear, torch.float64, inputs, False)
    plain = outcome(F.linear, torch.float32, inputs, autocast)
    for found, other, expected in zip(outcome(linear, torch.float32, inputs, autocast), plain, exact, strict=True):
        assert (found - expected).norm() <= 1.1 * (other - expected).norm() + 1e-6 * expected.norm()


def test_linear_makes_only_the_gradients_that_are_wanted(kernel, monkeypatch):
    x, weight = torch.randn(30, 8), torch.randn(9, 8, requires_grad=True)
    made = []

    def count(name, inner):
        monkeypatch.setattr(products, name, lambda *arguments: made.append(name) or inner(*arguments))

    for name in ("input_gradient", "weight_gradient", "bias_gradient"):
        count(name, getattr(products, name))
    linear(x, weight, torch.ones(9)).sum().backward()
    assert made == (["weight_gradient"] if kernel == "own" else [])
    torch.testing.assert_close(weight.grad, x.sum(0).expand(9, 8))
    with torch.no_grad():
        assert torch.equal(linear(x, weight), linear(x, weight.detach()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [24, 27])
def test_the_bias_gradient_is_a_sum_of_columns(kernel, dtype, rows):
    dy = matrix(rows, 1030, dtype, False)
    threads = torch.get_num_threads()
    found = products.bias_gradient(dy.view(-1, 3, 1030), torch.float32)
    exact = dy.double().sum(0)
    bound = 2**-8 if (kernel, dtype) == ("plain", torch.bfloat16) else 1e-6
    assert (found - exact).norm() <= bound * exact.norm()
    torch.set_num_threads(1 if threads > 1 else 2)
    assert torch.equal(products.bias_gradient(dy, torch.float32), found)
    torch.set_num_threads(threads)


def test_compiling_takes_the_plain_operation():
    x, weight = torch.randn(50, 8), torch.randn(9, 8)
    compiled = torch.compile(linear, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, weight), F.linear(x, weight))
