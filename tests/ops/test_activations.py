"""GELU and SwiGLU against torch in fp64, in every type, compiled and plain."""

import pytest
import torch

from tozan.ops import gelu, gelu_reference, native, swiglu, swiglu_reference

TYPES = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def outcome(function, tensors):
    """Output and gradients in fp64; the gradient that arrives is the same in every type."""
    tensors = [t.detach().requires_grad_() for t in tensors]
    y = function(*tensors)
    dy = torch.linspace(-2, 2, y.numel(), dtype=torch.float64).bfloat16().to(y.dtype).view(y.shape)
    found = (y, *torch.autograd.grad(y, tensors, dy))
    assert all(t.dtype == tensors[0].dtype for t in found)
    return [t.double() for t in found]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("count", [1, 0])
def test_equal_torch_in_fp64(kernels, dtype, count):
    """From far below to far above 0, with a last vector that is not full; then nothing at all."""
    x = torch.cat((torch.linspace(-12, 12, 5001), torch.tensor([-300.0, -1e4, 0.0, 300.0, 1e4])))[: count and None]
    x, up = x.double().to(dtype), x.flip(0).double().to(dtype)
    for function, reference, tensors in ((gelu, gelu_reference, [x]), (swiglu, swiglu_reference, [x, up])):
        exact = outcome(reference, [t.double() for t in tensors])
        plain = outcome(reference, tensors)
        for found, other, expected in zip(outcome(function, tensors), plain, exact, strict=True):
            # What is left beside the rounding is noise of cancelling terms, where torch has it, too.
            bound = TYPES[dtype] * expected.abs() + torch.maximum((other - expected).abs(), 2e-7 * expected.new_ones(1))
            assert ((found - expected).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_stays_so(kernels, dtype):
    x = torch.tensor([float("nan"), float("inf"), 1.0], dtype=dtype)
    for y in (gelu(x), swiglu(x, torch.ones_like(x))):
        assert y.isfinite().tolist() == [False, False, True]


def test_bits_depend_neither_on_position_nor_on_threads():
    """A slice gives the slice of the whole: a layout may cut anywhere, and hand a part to any number of threads."""
    x = torch.randn(40_007, generator=torch.Generator().manual_seed(0))
    threads = torch.get_num_threads()
    for dtype in (torch.float32, torch.bfloat16):
        whole = outcome(gelu, [x.to(dtype)])[0]
        for count in (1, 3):
            torch.set_num_threads(count)
            for start, end in ((0, 5), (3, 20_000), (16, 40_007)):
                part = gelu(x.to(dtype)[start:end]).double()
                assert torch.equal(part, whole[start:end])
            torch.set_num_threads(threads)


def test_strides_do_not_matter():
    x, dy = (torch.randn(33, 20, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    strided, whole = (t.requires_grad_() for t in (x.T.detach(), x.T.contiguous()))
    results = [(gelu(t), torch.autograd.grad(gelu(t), t, dy.T)[0]) for t in (strided, whole)]
    assert all(map(torch.equal, *results))


def test_compiling_takes_the_plain_operation():
    x = torch.randn(50)
    compiled = torch.compile(gelu, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), gelu_reference(x), rtol=0, atol=0)
    assert native.status() == native.COMPILED
