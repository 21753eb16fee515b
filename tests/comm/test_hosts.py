"""Several hosts, as network namespaces joined by veth: real launchers on each of them."""

import sys
from pathlib import Path

import pytest
from sockets import listening

from tozan.chaos import hosts

WORKER = str(Path(__file__).with_name("worker.py"))
pytestmark = pytest.mark.skipif(not hosts.available(), reason="needs iproute2, and root to make network namespaces")
PORT = 29_400


@pytest.fixture
def pair():
    with hosts.several(2) as made:
        yield made


def start(host, first, rank, role, **variables):
    e = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "OMP_NUM_THREADS": 1} | variables
    words = [sys.executable, WORKER, str(e["WORLD_SIZE"]), role]
    return host.start(words, MASTER_ADDR=first.name, MASTER_PORT=PORT, **e)


def test_of_several_addresses_rank_0_listens_on_the_one_that_leads_to_the_others(pair):
    """Its name is 127.0.1.1 there, so neither it nor the other rank of its host knows which one the others see."""
    first, second = pair
    first.add_address("192.168.214.1")
    where = [(first, 0, 0, 2), (first, 1, 1, 2), (second, 2, 0, 1)]
    started = [
        start(host, first, rank, "loop", WORLD_SIZE=3, LOCAL_RANK=local, LOCAL_WORLD_SIZE=size)
        for host, rank, local, size in where
    ]
    assert [process.stdout.readline()[:13] for process in started] == [f"rank {rank}: sum 3" for rank in range(3)]
    everything = {address for host in pair for address, _ in listening(host)}
    assert (first.address, PORT) in listening(first)
    assert everything <= {first.address, second.address, "127.0.0.1", "127.0.1.1"}
    assert ("127.0.1.1", PORT) in listening(first)  # tells where the store is, and nothing else
    for process in started:
        process.kill()
    assert f"rank 0 listens on {first.address}:{PORT}" in started[0].stderr.read()


def test_ranks_of_two_hosts_find_the_interface_between_them_although_rank_0_is_called_127_0_1_1(pair):
    started = [start(host, pair[0], rank, "once") for rank, host in enumerate(pair)]
    for host, process in zip(pair, started, strict=True):
        output, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
        assert "sum 1" in output
        assert f"on {host.name}" in errors
