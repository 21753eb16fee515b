"""Followers: what they make of a leader's silence and of its goodbye."""

from __future__ import annotations

import json
import os
import socket
import threading
import time

import pytest

from tozan.errors import EXIT_LOST, UserError
from tozan.recovery import node as local
from tozan.recovery import remote
from tozan.recovery.courier import token
from tozan.recovery.crew import Crew

SILENCE = 0.5


class Idle:
    """A node without ranks, which takes `ending` seconds to end."""

    def __init__(self, output=None):
        self.memories, self.processes, self.ending = {}, {}, 0.0
        self._reading, self._writing = os.pipe()

    def fileno(self):
        return self._reading

    def events(self):
        return []

    def begun(self):
        return {}

    def close(self):
        time.sleep(self.ending)
        os.close(self._reading)
        os.close(self._writing)


@pytest.fixture
def followed(monkeypatch):
    """(a leader's crew, its follower, a thread that follows, a list for what that returns)."""
    monkeypatch.setattr(remote, "SILENCE", SILENCE)
    monkeypatch.setattr(remote, "Node", Idle)
    with socket.create_server(("127.0.0.1", 0)) as free:
        leader = free.getsockname()
    crew, follower, returned = Crew(Idle(), 1), remote.Follower(leader), []
    thread = threading.Thread(target=lambda: returned.append(follower.run(patience=3.0)))
    thread.start()
    crew.listen(*leader, nodes=2, patience=10.0)
    assert crew.ranks == 2
    yield crew, follower, thread, returned
    follower.close()


def test_a_follower_hears_goodbye_though_the_leaders_node_ends_slowly(followed):
    crew, follower, thread, returned = followed
    crew._node.ending = follower.node.ending = 3 * SILENCE
    crew.close()
    thread.join(10)
    assert returned == [0]


def test_a_follower_hears_goodbye_beside_nodes_that_are_gone(followed):
    crew, _, thread, returned = followed
    gone = [socket.create_connection(crew._door.getsockname()) for _ in range(3)]
    for connection in gone:
        connection.sendall(json.dumps({"hello": "gone", "guests": 1, "token": token()}).encode() + b"\n")
    while len(crew._remotes) < 4:
        crew.poll(0.01)
    crew._remotes.reverse()  # the leader waits for each of them
    crew.close()
    thread.join(10)
    assert returned == [0]
    for connection in gone:
        connection.close()


def test_an_agent_that_is_busy_for_longer_is_not_given_up(followed):
    """Reading all copies of a node through takes seconds, on either side."""
    crew, follower, thread, returned = followed

    def read_through():
        time.sleep(4 * SILENCE)
        return {0: {7}}

    follower.node.steps = crew._node.steps = read_through
    assert crew.newest(1) == 7
    assert crew.poll(0.01) == []
    assert crew.ranks == 2
    crew.close()
    thread.join(10)
    assert returned == [0]


def test_a_follower_that_is_given_up_though_it_hears_its_leader_comes_back(followed, monkeypatch):
    """What it sends is lost on the way, for a while; the other way works."""
    crew, _, thread, returned = followed
    lost = crew._remotes[0]

    def nothing():
        raise TimeoutError("silent")

    monkeypatch.setattr(lost.wire, "hear", nothing)
    assert [event.kind for event in crew.poll(0.01)] == ["node"]
    end = time.monotonic() + 10
    while crew.ranks < 2 and time.monotonic() < end:
        crew.poll(0.05)
    assert crew.ranks == 2
    assert lost not in crew._remotes
    crew.close()
    thread.join(10)
    assert returned == [0]


def test_a_follower_gives_up_a_leader_that_is_silent(followed, capfd):
    crew, _, thread, returned = followed
    crew._door.close()
    crew._remotes[0].wire.say = lambda **_: None  # the leader's machine is gone
    thread.join(20)
    assert returned == [EXIT_LOST]
    assert "the leading agent is gone" in capfd.readouterr().err
    crew.close()


def test_agents_listen_on_one_address_alone(followed):
    crew, follower, _, _ = followed
    for listening in (crew._door, crew._guests._socket, follower._guests._socket):
        assert listening.getsockname()[0] == "127.0.0.1"
    crew.close()


def test_a_store_that_cannot_listen_is_an_error_and_no_waiting():
    node = local.Node()
    try:
        with pytest.raises(UserError, match=r"can listen on 203\.0\.113\.9"):
            node.store("203.0.113.9")  # kept free for documentation: nobody has it
        assert node.store("127.0.0.1") > 0
        port = node.store("127.0.0.2")  # once it is known by which address others come
        socket.create_connection(("127.0.0.2", port)).close()
        assert node.events() == []  # and the end of the first one is no loss
    finally:
        node.close()
