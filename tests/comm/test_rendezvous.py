"""Who can reach the ranks' store, and what a stranger who reaches it can do."""

import secrets
import shutil
import socket
import subprocess
import threading
from datetime import timedelta

import pytest
from forked import Forked
from torch._C._distributed_c10d import PrefixStore, TCPStore

from tozan.comm import rendezvous
from tozan.comm.rendezvous import Signed, ask, serve, sought


@pytest.fixture
def store():
    return serve("127.0.0.1", 0, one_machine=True, timeout_s=5)[0]


def client(port):
    return TCPStore("127.0.0.1", port, None, False, timeout=timedelta(seconds=5), wait_for_workers=False)


def test_a_signed_store_is_a_store(store):
    one, two = (Signed(PrefixStore("p", client(store.port)), b"secret", "group") for _ in range(2))
    one.set("text", "ñ")
    one.set("bytes", bytes(range(256)))
    assert two.get("text") == "ñ".encode()
    assert two.multi_get(["bytes", "text"]) == [bytes(range(256)), "ñ".encode()]
    assert two.check(["text"])
    assert not two.check(["nothing"])
    assert one.add("count", 2) + two.add("count", 3) == 7
    two.wait(["text"], timedelta(seconds=1))
    assert two.num_keys() >= 3
    assert one.delete_key("bytes")
    assert not two.check(["bytes"])


def test_a_part_of_a_signed_store_is_a_store(store):
    signed = Signed(client(store.port), b"secret", "group")
    part, stranger = PrefixStore("p", signed), client(store.port)
    part.set("text", "true")
    assert part.multi_get(["text"]) == [part.get("text")] == [b"true"]
    assert stranger.get("p/text") != b"true"  # but signed
    assert part.add("count", 2) == 2
    part.wait(["text", "count"], timedelta(seconds=1))
    assert part.num_keys() == signed.num_keys()
    assert part.delete_key("text")
    assert not part.check(["text"])


@pytest.mark.parametrize(
    "write",
    [
        lambda stranger, honest: stranger.set("p/a", "evil"),
        lambda stranger, honest: stranger.set("p/a", ""),
        lambda stranger, honest: Signed(PrefixStore("p", stranger), b"guess", "group").set("a", "evil"),
        lambda stranger, honest: stranger.set("p/a", stranger.get("p/other")),
        lambda stranger, honest: Signed(PrefixStore("p", stranger), b"secret", "another scope").set("a", "evil"),
        lambda stranger, honest: stranger.set("p/a", stranger.get("p/a") + b"x"),
    ],
    ids=["plain", "empty", "wrong secret", "value of another key", "value of another scope", "lengthened"],
)
def test_what_a_stranger_writes_is_refused_by_name(store, write):
    honest = Signed(PrefixStore("p", client(store.port)), b"secret", "group")
    honest.set("a", "true")
    honest.set("other", "true, too")
    write(client(store.port), honest)
    for read in (lambda: honest.get("a"), lambda: honest.multi_get(["a"])):
        with pytest.raises(RuntimeError, match=r"'a' is not signed with this job's secret \(TOZAN_SECRET\)"):
            read()


WORKER = """
import sys, time, torch
from tozan.comm import collectives, launch
from tozan.layout import Layout
with launch.join(Layout(dp=2), timeout_s=5, lost_after_s=3) as mesh:
    print(int(collectives.all_reduce(torch.ones(1), mesh["dp"]).item()), flush=True)
    sys.stdin.readline()
"""


def start(folder, port, keys):
    (folder / "worker.py").write_text(WORKER)
    common = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        Forked([folder / "worker.py"], RANK=rank, **common, **{rendezvous.VARIABLE: key})
        for rank, key in enumerate(keys)
    ]


def free_port() -> int:
    return serve("127.0.0.1", 0, one_machine=True)[0].port


def test_who_comes_from_another_machine_shows_by_which_address_this_one_is_seen(monkeypatch):
    """127.0.0.3 plays the other machine, and 127.0.0.2 the address that it knows."""
    monkeypatch.setattr(rendezvous, "is_loopback", lambda address: address == "127.0.0.1")
    listening, found = socket.create_server(("0.0.0.0", 0)), []
    port = listening.getsockname()[1]
    thread = threading.Thread(target=lambda: found.append(sought(listening, {"127.0.0.9"}, 10)))
    thread.start()
    for mine in ("127.0.0.1", "127.0.0.9", "127.0.0.3"):
        with socket.create_connection(("127.0.0.2", port), source_address=(mine, 0)) as connection:
            assert connection.recv(1) == b""
    thread.join(10)
    assert found == ["127.0.0.2"]
    with pytest.raises(TimeoutError):
        sought(socket.create_server(("127.0.0.1", 0)), set(), 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(TimeoutError, match="did not say"):
        ask("127.0.0.1", silent.getsockname()[1], 0.05)


@pytest.mark.skipif(shutil.which("ss") is None, reason="needs iproute2")
def test_a_job_on_one_machine_listens_on_loopback_only(tmp_path):
    """Every listening socket of both ranks, as the kernel sees them."""
    key = secrets.token_hex(16)
    port = free_port()
    ranks = start(tmp_path, port, [key, key])
    try:
        assert [rank.stdout.readline() for rank in ranks] == ["2\n", "2\n"]
        table = subprocess.run(["ss", "-ltnpH"], capture_output=True, text=True, check=True).stdout
        own = [line.split()[3] for line in table.splitlines() if any(f"pid={rank.pid}," in line for rank in ranks)]
        assert f"127.0.0.1:{port}" in own
        assert len(own) >= 3
        assert all(address.startswith("127.0.0.1:") for address in own), own
        for rank in ranks:
            rank.type("\n")
        outcomes = [rank.communicate(timeout=60) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert "signed with the job's secret" in outcomes[0][1]
    assert f"127.0.0.1:{port}" in outcomes[0][1]


def test_a_rank_with_another_secret_is_not_admitted(tmp_path):
    ranks = start(tmp_path, free_port(), ["right", "wrong"])
    try:
        errors = [rank.communicate(timeout=90)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert all(rank.returncode for rank in ranks)
    assert any("is not signed with this job's secret" in error for error in errors), errors
