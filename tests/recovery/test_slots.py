import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tozan.recovery.slots import PAGE, Slots, begun, clear_begun, create


@pytest.fixture
def memory():
    descriptor = create("test")
    yield Slots(descriptor)
    os.close(descriptor)


def write(slots, step, content):
    body = slots.body(len(content))
    body[:] = content
    total = sum(int.from_bytes(content[i : i + 8], "little") for i in range(0, len(content), 8))
    slots.commit(step, {"step": step}, len(content), total)


def held(slots):
    return {step: (slots.read(step)[0], bytes(slots.read(step)[1])) for step in slots.steps()}


@settings(max_examples=30)
@given(st.lists(st.binary(min_size=1, max_size=8).map(lambda b: b.ljust(8, b"\0") * 3), min_size=1, max_size=6))
def test_the_newest_two_are_held(contents):
    descriptor = create("test")
    slots = Slots(descriptor)
    for step, content in enumerate(contents):
        write(slots, step, content)
    other = Slots(descriptor)  # as the agent sees them
    newest = dict(list(enumerate(contents))[-2:])
    assert held(other) == {step: ({"step": step}, content) for step, content in newest.items()}
    os.close(descriptor)


def test_a_torn_write_leaves_the_step_before(memory):
    write(memory, 1, b"a" * 64)
    write(memory, 2, b"b" * 64)
    memory.body(64)[:32] = b"c" * 32  # and the writer dies here
    assert list(held(memory)) == [2]
    write(memory, 3, b"d" * 64)
    assert list(held(memory)) == [2, 3]


def test_every_flipped_bit_is_seen(memory):
    write(memory, 1, bytes(range(64)))
    write(memory, 2, b"b" * 64)
    raw = memory._map
    at = raw.find(bytes(range(64)))
    for bit in range(64 * 8):
        raw[at + bit // 8] ^= 1 << bit % 8
        assert memory.steps() == [2]
        assert memory.read(1) is None
        raw[at + bit // 8] ^= 1 << bit % 8
    assert memory.steps() == [1, 2]


def test_every_flipped_bit_of_record_and_head_is_seen(memory):
    write(memory, 7, b"b" * 64)
    places = [64 + i for i in range(44)] + [PAGE + i for i in range(len('{"step": 7}'))]
    for at in places:
        for bit in range(8):
            memory._map[at] ^= 1 << bit
            assert memory.steps() == [], (at, bit)
            memory._map[at] ^= 1 << bit
    assert memory.steps() == [7]


def test_later_steps_can_be_forgotten_and_the_slot_is_used_again(memory):
    write(memory, 4, b"a" * 64)
    write(memory, 5, b"b" * 64)
    memory.forget(after=4)
    assert memory.steps() == [4]
    write(memory, 5, b"c" * 64)
    assert memory.steps() == [4, 5]
    memory.forget()
    assert memory.steps() == []


def test_a_larger_state_replaces_all(memory):
    write(memory, 4, b"a" * 64)
    write(memory, 5, b"a" * 200_000)
    assert memory.steps() == [5]
    assert Slots(memory._descriptor).steps() == [5]


def test_begun_is_seen_by_others(memory):
    assert begun(memory._descriptor) == (0, 0)
    memory.begin(12)
    memory.begin(13)
    assert begun(memory._descriptor) == (13, 12)
    clear_begun(memory._descriptor)
    assert begun(memory._descriptor) == (0, 0)
