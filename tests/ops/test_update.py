"""AdamW against its paper in fp64, and checksums against NumPy, compiled and plain."""

import numpy as np
import pytest
import torch

from tozan.ops import adamw, adamw_reference, checksum_reference, checksums
from tozan.ops.update import Rates

SIZES = [(70, 61), (1,), (0,), (3, 5), (9001,)]


def state(dtype, seed=0):
    """Parameters, gradients and both moments."""
    random = torch.Generator().manual_seed(seed)
    p, g, m, v = ([torch.randn(size, generator=random).to(dtype) for size in SIZES] for _ in range(4))
    return p, g, m, [square.square() for square in v]


def by_the_paper(p, g, m, v, rates):
    """Algorithm 2 of arXiv 1711.05101."""
    g = g * rates.scale
    m = rates.beta1 * m + (1 - rates.beta1) * g
    v = rates.beta2 * v + (1 - rates.beta2) * g * g
    m_hat, v_hat = m / (1 - rates.beta1**rates.updates), v / (1 - rates.beta2**rates.updates)
    return p * (1 - rates.lr * rates.decay) - rates.lr * m_hat / (v_hat.sqrt() + rates.eps), m, v


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("updates", [1, 1000])
def test_equal_the_paper_in_fp64(kernels, dtype, updates):
    rates = Rates(1e-2, 0.9, 0.95, 1e-8, 0.1, updates, scale=0.3)
    before = state(dtype)
    exact = [by_the_paper(*(t.double() for t in tensors), rates) for tensors in zip(*before, strict=True)]
    p, g, m, v = before
    sums = adamw(p, g, m, v, rates)
    for found, expected in zip(zip(p, m, v, strict=True), exact, strict=True):
        for one, other in zip(found, expected, strict=True):
            tolerance = 1e-12 if dtype == torch.float64 else 2e-6
            torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance)
    assert bool(sums) == (kernels == "auto" and dtype == torch.float32)
    assert sums in ([], [tuple(checksums(group)) for group in zip(p, m, v, strict=True)])


def test_bits_depend_neither_on_threads_nor_on_where_a_tensor_is_cut():
    rates, threads = Rates(1e-3, 0.9, 0.95, 1e-8, 0.1, 7, scale=0.7), torch.get_num_threads()
    whole, cut = state(torch.float32), state(torch.float32)
    adamw(*whole, rates)
    torch.set_num_threads(3)
    for part in (slice(0, 4097), slice(4097, 9001)):
        adamw(*([group[4][part]] for group in cut), rates)
    torch.set_num_threads(threads)
    assert all(torch.equal(group[4], other[4]) for group, other in zip(whole[::2], cut[::2], strict=True))


def test_differs_from_torch_by_rounding_only():
    rates = Rates(1e-3, 0.9, 0.95, 1e-8, 0.1, 3, scale=0.5)
    ours, theirs = state(torch.float32), state(torch.float32)
    adamw(*ours, rates)
    adamw_reference(*theirs, rates)
    for group, other in zip((ours[0], *ours[2:]), (theirs[0], *theirs[2:]), strict=True):
        torch.testing.assert_close(group, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("size", [0, 1, 2, 3, 7, 64, 20_001])
def test_a_checksum_is_the_sum_of_64_bit_words_and_sees_every_bit(kernels, dtype, size):
    whole = torch.randn(size + 1, generator=torch.Generator().manual_seed(0)).to(dtype)
    tensors = [whole[:size], whole[1:], whole.view(1, -1).expand(2, -1).T]  # the second begins between two words
    data = [tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in tensors]
    padded = [np.frombuffer(one + bytes(-len(one) % 8), "<u8") for one in data]
    expected = [int(words.sum(dtype=np.uint64)) for words in padded]
    assert checksums(tensors) == expected
    assert [int(checksum_reference(tensor)) % 2**64 for tensor in tensors] == expected
    if dtype == torch.float32:
        bits = whole.view(torch.int32)
        for bit in range(32):
            bits[size // 2] ^= torch.tensor(1 << bit if bit < 31 else -(1 << 31), dtype=torch.int32)
            assert checksums([whole]) != expected
            bits[size // 2] ^= torch.tensor(1 << bit if bit < 31 else -(1 << 31), dtype=torch.int32)
    assert checksums(tensors) == expected
