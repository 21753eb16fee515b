"""Rotary positions against a product of complex numbers in fp64, in every type, compiled and plain."""

import pytest
import torch

from tozan.models.layers import Rotary
from tozan.ops import rotate, rotate_reference

TYPES = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def by_complex_numbers(x, cos, sin, turned):
    """Elements i and i + S/2 as one number, times e^(i·angle)."""
    half = x.shape[-1] // 2
    turn = torch.complex(cos.double(), sin.double())[:, None]
    pairs = torch.complex(x[..., :turned, :half], x[..., :turned, half:]) * turn
    return torch.cat((torch.cat((pairs.real, pairs.imag), dim=-1), x[..., turned:, :]), dim=-2)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("size", "turned"), [(64, 3), (10, 5), (36, 0)])
def test_equal_complex_numbers(kernels, dtype, size, turned):
    x, dy = (torch.randn(2, 7, 5, size, generator=torch.Generator().manual_seed(n)).to(dtype) for n in (0, 1))
    rotary = Rotary(size, 20, 1e4)
    cos, sin = rotary.cos[4:11], rotary.sin[4:11]
    wide = x.double().requires_grad_()
    exact = by_complex_numbers(wide, cos, sin, turned)
    slope = torch.autograd.grad(exact, wide, dy.double())[0]
    x.requires_grad_()
    y = rotary(x, turned, 4)
    dx = torch.autograd.grad(y, x, dy)[0]
    assert y.dtype == dx.dtype == dtype
    for found, expected in ((y, exact), (dx, slope)):
        torch.testing.assert_close(found.double(), expected, rtol=TYPES[dtype], atol=4 * TYPES[dtype])
    assert torch.equal(y[..., turned:, :], x[..., turned:, :])


def test_bits_depend_neither_on_threads_nor_on_other_heads():
    x = torch.randn(3, 50, 6, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    rotary, threads = Rotary(64, 50, 1e4), torch.get_num_threads()
    whole = rotary(x, 5)
    torch.set_num_threads(3)
    assert torch.equal(rotary(x[1:, 9:, 2:4], 2, 9), whole[1:, 9:, 2:4])
    torch.set_num_threads(threads)


def test_compiling_takes_the_plain_operation():
    x, cos, sin = torch.randn(2, 5, 3, 8), torch.rand(5, 4), torch.rand(5, 4)
    compiled = torch.compile(rotate, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, cos, sin, 2), rotate_reference(x, cos, sin, 2), rtol=0, atol=0)
