"""Attention's kernel against PyTorch's own in fp64: any shape, in memory as it comes, and the same bits always."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tozan.ops import attention, causal_attention, causal_attention_reference, fused, split_heads

from .test_attention import inputs, outcome

BOUND = {torch.float32: 2e-6, torch.bfloat16: 2**-7}
"""Of the error's norm, over that of the result."""


@pytest.fixture(autouse=True)
def kernel(monkeypatch):
    """The kernel is compiled here, and used whoever made the processor."""
    if fused.on_vectors() is None:
        pytest.skip("no AVX-512 with bf16 here")
    monkeypatch.setattr(fused, "usable", lambda q: True)
    monkeypatch.setattr(fused, "library", lambda dtype: fused.on_vectors())


def close(found, expected, dtype, tokens):
    assert found.isfinite().all()
    # Beside that the rounding of terms that cancel: the scores of a lone token have no gradient, those of two little.
    bound = BOUND[dtype] * (2 if tokens < 8 else 1)
    assert (found - expected).norm() <= bound * expected.norm() + 1e-5


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)]),
    st.sampled_from([1, 7, 16, 33, 64, 80, 128]),
    st.sampled_from([1, 2, 8, 31, 64, 127, 129, 258, 300]),
)
def test_equals_torch_in_fp64(dtype, heads, size, tokens):
    tensors = inputs(dtype, tokens, *heads, size)
    exact = outcome(causal_attention_reference, [t.detach().double().requires_grad_() for t in tensors])
    for found, expected in zip(outcome(causal_attention, tensors), exact, strict=True):
        close(found, expected, dtype, tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_scores_keep_their_softmax(dtype):
    """Scores of some thousands, the largest in the last of several blocks of keys: nothing overflows."""
    q, k, v = (t.detach() for t in inputs(dtype, 600, 1, 1, 64, batch=1))
    q, k = q * 30, k * torch.linspace(0.1, 30, 600).to(dtype)[:, None]
    tensors = [t.requires_grad_() for t in (q, k, v)]
    exact = outcome(causal_attention_reference, [t.detach().double().requires_grad_() for t in tensors])
    found = outcome(causal_attention, tensors)
    assert (found[0] - exact[0]).norm() <= 5e-3 * exact[0].norm()
    assert all(t.isfinite().all() for t in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_depend_on_neither_threads_nor_memory_nor_other_heads(dtype):
    tensors = inputs(dtype, 300, 6, 2, 32)
    alone = outcome(causal_attention, tensors)
    torch.set_num_threads(5)
    assert all(map(torch.equal, alone, outcome(causal_attention, tensors)))
    contiguous = [t.detach().contiguous().requires_grad_() for t in tensors]
    assert all(map(torch.equal, alone, outcome(causal_attention, contiguous)))
    backwards = [t.detach().transpose(2, 3).contiguous().transpose(2, 3).requires_grad_() for t in tensors]
    assert all(map(torch.equal, alone, outcome(causal_attention, backwards)))
    y = causal_attention(*tensors)
    some = [t.detach()[1:, heads] for t, heads in zip(tensors, [slice(3, 6), slice(1, 2), slice(1, 2)], strict=True)]
    assert torch.equal(causal_attention(*some), y[1:, 3:])


@pytest.mark.parametrize("tokens", [97, 600])
def test_threads_that_share_a_head_make_the_bits_of_one(tokens):
    tensors = inputs(torch.bfloat16, tokens, 2, 1, 32, batch=1)
    alone = outcome(causal_attention, tensors)
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, alone, outcome(causal_attention, tensors)))


def test_nan_is_not_hidden():
    tensors = inputs(torch.bfloat16, 40, 1, 1)
    tensors[1].data[0, 0, 20] = float("nan")
    y = causal_attention(*tensors)
    assert y[0, 0, :20].isfinite().all()
    assert y[0, 0, 20:].isnan().all()


def test_gradients_are_handed_on_without_a_copy(monkeypatch):
    x = torch.randn(2, 40, 8, 16).transpose(1, 2).requires_grad_()
    made, arrived, parts = [], [], attention.split_gradients
    monkeypatch.setattr(attention, "split_gradients", lambda g, k: made.append(g.data_ptr()) or parts(g, k))
    x.register_hook(arrived.append)
    causal_attention(*split_heads(x, [4, 2, 2])).sum().backward()
    assert arrived[0].data_ptr() in made
    assert arrived[0].shape == x.shape


def test_split_heads_puts_other_gradients_together():
    x = torch.randn(2, 8, 5, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: [p * 2 for p in split_heads(x, [4, 2, 2])], x)
