"""Copies on their way to the neighbouring node: there is always a step that is whole wherever it is looked for."""

from __future__ import annotations

import os
import random
import socket
import time
from types import SimpleNamespace

import pytest
import torch
from ranks import spawn

from tozan.comm import Mesh
from tozan.comm.texts import all_gather_texts
from tozan.layout import Layout
from tozan.recovery import courier, slots
from tozan.recovery.courier import Courier, Guests
from tozan.recovery.node import Memory
from tozan.recovery.slots import Slots
from tozan.train.copies import Copies


class Memories:
    """What a node keeps, without a fork server."""

    def __init__(self):
        self.memories = {}

    def memory(self, rank):
        if rank not in self.memories:
            self.memories[rank] = Memory(*(slots.create(kind) for kind in ("own", "outbox", "guest")))
        return self.memories[rank]


def write(descriptor, step, size=64):
    with Slots(descriptor) as held:
        body = held.body(size)
        body[:] = bytes([step % 256]) * size
        held.commit(step, {"step": step}, size, slots.checksum(body))


def wait_until(happened, seconds=10.0):
    end = time.monotonic() + seconds
    while not (found := happened()):
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.005)
    return found


@pytest.fixture
def pair():
    """(a node, its courier, the neighbouring node, its guests)."""
    here, there = Memories(), Memories()
    guests, carries = Guests(there, socket.create_server(("127.0.0.1", 0))), Courier(here)
    guests.start()
    carries.start()
    yield here, carries, there, guests
    carries.stop()
    guests.stop()


def arrived(memories, rank):
    with Slots(memories.memory(rank).outbox) as held:
        return held.arrived()


def test_a_copy_arrives_and_that_is_known_here(pair):
    here, carries, there, guests = pair
    for rank in (0, 1):
        write(here.memory(rank).outbox, 4)
    carries.neighbour(("127.0.0.1", guests.port))
    wait_until(lambda: [arrived(here, rank) for rank in (0, 1)] == [4, 4])
    assert [slots.steps_of(there.memory(rank).guest) for rank in (0, 1)] == [[4], [4]]
    carries.neighbour(None)
    assert arrived(here, 0) is None


def test_a_step_that_is_done_again_is_sent_again(pair):
    here, carries, there, guests = pair
    carries.neighbour(("127.0.0.1", guests.port))
    for step in (4, 8):
        write(here.memory(0).outbox, step)
        wait_until(lambda step=step: arrived(here, 0) == step)
    with Slots(here.memory(0).outbox) as outbox:  # ranks or agents go back
        outbox.forget(after=4)
    wait_until(lambda: slots.steps_of(there.memory(0).guest) == [4])
    write(here.memory(0).outbox, 8)
    wait_until(lambda: arrived(here, 0) == 8)
    assert slots.steps_of(there.memory(0).guest) == [4, 8]


def test_a_damaged_copy_is_not_sent_but_the_one_before(pair):
    here, carries, there, guests = pair
    write(here.memory(0).outbox, 4)
    write(here.memory(0).outbox, 8)
    with Slots(here.memory(0).outbox) as outbox:
        outbox._map[outbox._map.rfind(bytes([8]) * 64)] ^= 1
    carries.neighbour(("127.0.0.1", guests.port))
    wait_until(lambda: arrived(here, 0) == 4)
    assert slots.steps_of(there.memory(0).guest) == [4]


def test_a_copy_may_take_longer_than_a_neighbour_may_be_silent(pair, monkeypatch):
    here, carries, there, guests = pair
    monkeypatch.setattr(courier, "_PATIENCE", 0.3)
    size = 24 << 20
    readinto = socket.SocketIO.readinto

    def slowly(self, buffer):
        time.sleep(0.02)
        return readinto(self, memoryview(buffer)[: 1 << 19])

    monkeypatch.setattr(socket.SocketIO, "readinto", slowly)
    write(here.memory(0).outbox, 4, size)
    begin = time.monotonic()
    carries.neighbour(("127.0.0.1", guests.port))
    wait_until(lambda: arrived(here, 0) == 4, 30)
    assert time.monotonic() - begin > 2 * courier._PATIENCE
    assert slots.steps_of(there.memory(0).guest) == [4]


def test_no_memory_for_a_copy_is_said(pair, monkeypatch, capfd):
    here, carries, _, guests = pair

    def full(*_):
        raise OSError(28, "No space left on device")

    write(here.memory(0).outbox, 4)
    monkeypatch.setattr(os, "posix_fallocate", full)
    carries.neighbour(("127.0.0.1", guests.port))
    wait_until(lambda: "no memory for the copy of rank 0 from another node: No space left" in capfd.readouterr().err)
    assert arrived(here, 0) is None


def _race(seed):
    """A rank and its agent in one: steps go by, copies arrive late and at random; a write may be cut short.

    Returns:
        Whether after every step there was one that all outboxes and all neighbours had, once there was a first.
    """
    memory = Memory(*(slots.create(kind) for kind in ("own", "outbox", "guest")))
    told = {"memory": memory.own, "outbox": memory.outbox, "source": memory.own, "neighbour": 2, "leave": False}
    copies = Copies(told | {"copies": True, "resume": None})
    mesh = Mesh.create(Layout(dp=2))
    chance, together = random.Random(f"{seed} {mesh.rank}"), random.Random(seed)
    run = SimpleNamespace(split=SimpleNamespace(mesh=mesh), checks=SimpleNamespace(confirm=lambda step: None), step=0)
    copies._tensors = lambda run: [("x", torch.full((64,), run.step % 256, dtype=torch.uint8))]
    copies._signature, run.meta, run.peak_flops = (lambda run: ""), dict, 1.0
    whole = []
    for run.step in range(1, 50):
        copies.keep(run)
        outbox = Slots(memory.outbox)
        if together.random() < 0.1 and run.step % 2 == 0 and chance.random() < 0.5 and outbox.newest() == run.step:
            outbox.forget(after=run.step - 1)  # killed just before it was complete, and started again
        if chance.random() < 0.4 and (step := outbox.newest()) is not None:
            with Slots(memory.guest) as guest:
                guest.forget(after=step)
                there = step in guest.steps()
            if not there:
                write(memory.guest, step)
            slots.note_arrival(memory.outbox, step)
        said = all_gather_texts(
            f"{slots.steps_of(memory.outbox)} {slots.steps_of(memory.guest)}".replace("] [", "];["), mesh.everyone
        )
        held = [{int(n) for n in part.strip("[]").split(",") if n} for one in said for part in one.split(";")]
        whole.append(bool(set.intersection(*held)))
    first = whole.index(True)
    return first < 30 and all(whole[first:])


@pytest.mark.parametrize("seed", range(2))
def test_of_a_lost_node_a_step_is_whole_however_late_its_copies_were(seed):
    assert all(spawn(2, _race, seed))
