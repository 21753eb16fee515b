"""Where tensors lie: no two in one place, no more memory than they need, and PyTorch's own errors."""

import os
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tozan.ops import native

MIB = 1 << 20


@pytest.fixture(autouse=True)
def arena():
    """Tensors are made in the arena from here on; the machine must be able to compile."""
    assert native.arena() == native.ARENA
    native.arena_bytes(again=True)


def touched() -> int:
    return native.arena_bytes()[2]


def live() -> int:
    return native.arena_bytes()[0]


def churn(seed: int) -> None:
    """Make, fill, grow, read and drop tensors in no order, each filled with a number of its own."""
    draw, held = random.Random(seed), []
    for number in range(seed * 1000, seed * 1000 + 400):
        tensor = torch.empty(draw.choice([1, 100, 16_384, 20_000, 99_999, 400_001]), dtype=torch.int32)
        assert tensor.data_ptr() % 64 == 0
        if draw.random() < 0.2:
            tensor.resize_(2 * tensor.numel())
        held.append((number, tensor.fill_(number)))
        while held and draw.random() < 0.49:
            number, tensor = held.pop(draw.randrange(len(held)))
            assert bool((tensor == number).all())


def test_no_two_tensors_lie_in_one_place():
    before = live()
    churn(1)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(churn, range(2, 6)))
    assert live() == before


def test_a_tensor_takes_the_hole_that_its_like_has_left():
    """glibc 2.36 takes 300 MB for this; the arena may have holes from before, but needs no new memory."""
    held = [torch.empty(MIB, dtype=torch.uint8) for _ in range(200)]
    before = touched()
    for _ in range(3):
        held[::2] = [None] * 100
        held[::2] = [torch.empty(MIB, dtype=torch.uint8) for _ in range(100)]
    assert touched() == before


def test_holes_side_by_side_are_one():
    held = [torch.empty(MIB, dtype=torch.uint8) for _ in range(64)]
    before = touched()
    del held
    torch.empty(64 * MIB, dtype=torch.uint8)
    assert touched() - before < 32 * MIB  # some of the 64 may have lain in holes of other tests


def test_counts_are_those_of_the_tensors():
    before = live()
    a, b = torch.empty(3 * MIB, dtype=torch.uint8), torch.empty(5 * MIB, dtype=torch.uint8)
    del a
    assert native.arena_bytes()[:2] == (before + 5 * MIB, before + 8 * MIB)
    small = torch.empty(1000, dtype=torch.uint8)
    native.arena_bytes(again=True)
    assert native.arena_bytes()[:2] == (before + 5 * MIB, before + 5 * MIB)
    del b, small


def test_too_large_is_pytorchs_own_error():
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        torch.empty(1 << 46, dtype=torch.uint8)


def test_a_forked_child_goes_on_with_its_copy():
    kept = torch.full((MIB,), 7, dtype=torch.uint8)
    process = os.fork()
    if not process:  # one element at a time: OpenMP's threads are not there any more
        other = torch.empty(MIB, dtype=torch.uint8)
        other[-1], kept[-1] = 8, 9
        os._exit(0 if other[-1].item() == 8 else 1)
    assert os.waitpid(process, 0)[1] == 0
    assert bool((kept == 7).all())


def test_plain_pytorch_asks_for_none():
    native.choose("plain")
    try:
        assert native.arena_bytes() is None
        assert "asked for" in native.arena()
    finally:
        native.choose("auto")
