"""Attention in blocks against PyTorch's own, in fp64 and bf16."""

import pytest
import torch

from tozan.models import Shape, create
from tozan.ops import attention, causal_attention, causal_attention_reference


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def inputs(dtype, tokens, heads=4, kv_heads=4, size=16, batch=2):
    """Queries, keys and values as attention hands them over: views of one tensor."""
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(batch, tokens, heads + 2 * kv_heads, size, generator=generator, dtype=torch.float64)
    parts = packed.to(dtype).transpose(1, 2).split([heads, kv_heads, kv_heads], dim=1)
    return [part.detach().requires_grad_() for part in parts]


def outcome(function, tensors):
    """Output and gradients, in fp64."""
    y = function(*tensors)
    generator = torch.Generator().manual_seed(1)
    dy = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
    return [t.double() for t in (y, *torch.autograd.grad(y, tensors, dy))]


@pytest.mark.parametrize("tokens", [1, 5, 128, 129, 300])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)])
def test_equals_torch_in_fp64(tokens, heads):
    tensors = inputs(torch.float64, tokens, *heads)
    for found, expected in zip(
        outcome(causal_attention, tensors), outcome(causal_attention_reference, tensors), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("tokens", [200, 1030])
def test_bf16_is_within_bf16s_rounding(kernels, tokens):
    tensors = inputs(torch.bfloat16, tokens, 2, 1, 64, batch=1)
    exact = outcome(causal_attention_reference, [t.detach().double().requires_grad_() for t in tensors])
    for found, expected in zip(outcome(causal_attention, tensors), exact, strict=True):
        assert (found - expected).norm() <= 2**-7 * expected.norm()


def test_fp32_equals_torch_in_fp64(kernels):
    tensors = inputs(torch.float32, 300, 6, 2)
    exact = outcome(causal_attention_reference, [t.detach().double().requires_grad_() for t in tensors])
    for found, expected in zip(outcome(causal_attention, tensors), exact, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_gradcheck():
    assert torch.autograd.gradcheck(causal_attention, inputs(torch.float64, 6, 2, 1, 4, batch=1))


def test_operators_keep_their_promises_to_the_compiler():
    torch.library.opcheck(torch.ops.tozan.causal_attention.default, inputs(torch.float32, 130, 4, 2, 8, batch=1))


def test_the_future_is_not_seen(kernels):
    tensors = inputs(torch.bfloat16, 260)
    before = causal_attention(*tensors)
    for tensor in tensors:
        tensor.data[:, :, 200:] = 7.0
    assert torch.equal(causal_attention(*tensors)[:, :, :200], before[:, :, :200])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_models_use_it_in_bf16_and_agree_with_torch(family, monkeypatch):
    from tozan.models import layers

    shape = Shape(family, 2, 64, 4, 4 if family == "gpt2" else 2, 128, 100, 160)
    model = create(shape, 0)
    x = torch.randint(0, 100, (2, 160), generator=torch.Generator().manual_seed(0))

    def gradients():
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x, x)
        loss.backward()
        return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])

    calls = []
    monkeypatch.setattr(layers, "causal_attention", lambda *t: calls.append(1) or causal_attention(*t))
    loss, found = gradients()
    assert len(calls) == 2
    monkeypatch.setattr(attention, "pays", lambda q: False)
    expected_loss, expected = gradients()
    assert loss == pytest.approx(expected_loss, rel=1e-3)
    assert (found - expected).norm() <= 0.02 * expected.norm()
