"""Norms against torch in fp64, in every type, compiled and plain."""

import pytest
import torch

from tozan.ops import layer_norm, layer_norm_reference, rms_norm, rms_norm_reference

TYPES = {"fp64": 1e-13, "fp32": 2e-6, "bf16": 2**-7, "bf16 under autocast": 2**-7, "fp16 under autocast": 2**-10}
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}


def outcome(function, x, weight, bias, dy, precision):
    """Result and gradients in fp64, and the result's type."""
    tensors = [t.detach().clone().requires_grad_() for t in ((x, weight) if bias is None else (x, weight, bias))]
    kind = torch.float16 if precision.startswith("fp16") else torch.bfloat16
    with torch.autocast("cpu", kind, enabled="autocast" in precision):
        y = function(*tensors, 1e-5)
    found = (y, *torch.autograd.grad(y, tensors, dy.to(y.dtype)))
    assert all(gradient.dtype == tensor.dtype for gradient, tensor in zip(found[1:], tensors, strict=True))
    return y.dtype, [t.double() for t in found]


@pytest.mark.parametrize("precision", TYPES)
@pytest.mark.parametrize("rows", [0, 1, 67])
def test_equal_torch_in_fp64(kernels, precision, rows):
    """Rows far from 0, a last vector that is not full, blocks of rows that are not full, and no rows at all."""
    random = torch.Generator().manual_seed(rows)
    x, dy = (torch.randn(rows, 3, 53, generator=random) for _ in range(2))
    weight, bias = (1 + torch.randn(53, generator=random).bfloat16().float() for _ in range(2))
    x = (3 + 2 * x).to(DTYPES.get(precision, torch.float32))
    dy = dy.bfloat16().double()
    if precision == "fp64":
        weight, bias = weight.double(), bias.double()
    for function, reference, given in (
        (layer_norm, layer_norm_reference, bias),
        (rms_norm, rms_norm_reference, None),
    ):
        if precision == "bf16" and given is None:
            weight = weight.bfloat16()  # PyTorch's operation asks for one type
        exact = outcome(reference, x.double(), weight.double(), None if given is None else given.double(), dy, "fp64")
        dtype, found = outcome(function, x, weight, given, dy, precision)
        wanted = {"bf16 under autocast": torch.bfloat16, "fp16 under autocast": torch.float16}
        assert dtype == wanted.get(precision, x.dtype)
        plain = outcome(reference, x, weight, given, dy, precision)[1]
        for one, other, expected in zip(found, plain, exact[1], strict=True):
            # PyTorch adds gradients of weights up in their own type.
            bound = TYPES[precision] * (expected.abs() + 8) + (other - expected).abs()
            assert ((one - expected).abs() <= bound).all()


def test_bits_depend_on_no_number_of_threads():
    """Nor do those of a row depend on the rows beside it."""
    random = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(300, 200, generator=random) for _ in range(2))
    weight, bias = torch.randn(200, generator=random), torch.zeros(200)
    threads, results = torch.get_num_threads(), []
    for count in (1, 3):
        torch.set_num_threads(count)
        results.append(outcome(layer_norm, x, weight, bias, dy, "bf16 under autocast")[1])
    torch.set_num_threads(threads)
    assert all(map(torch.equal, *results))
    part = outcome(layer_norm, x[7:200], weight, bias, dy[7:200], "bf16 under autocast")[1]
    assert torch.equal(part[0], results[0][0][7:200])
    assert torch.equal(part[1], results[0][1][7:200])


def test_strides_do_not_matter_and_nan_stays():
    x = torch.randn(20, 33, generator=torch.Generator().manual_seed(0))
    weight = torch.ones(33)
    assert torch.equal(rms_norm(x.T.contiguous().T, weight, 1e-5), rms_norm(x, weight, 1e-5))
    x[3, 4] = float("nan")
    assert rms_norm(x, weight, 1e-5).isnan().any(dim=1).tolist() == [row == 3 for row in range(20)]


def test_compiling_takes_the_plain_operation():
    x, weight = torch.randn(5, 20), torch.rand(20)
    compiled = torch.compile(rms_norm, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, weight, 1e-5), rms_norm_reference(x, weight, 1e-5), rtol=0, atol=0)
