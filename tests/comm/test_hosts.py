"""Several hosts, as network namespaces joined by veth: real launchers on each of them."""

import sys
from pathlib import Path

import pytest

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
    return host.start([sys.executable, WORKER, "2", role], MASTER_ADDR=first.name, MASTER_PORT=PORT, **e)


def test_ranks_of_two_hosts_find_the_interface_between_them_although_rank_0_is_called_127_0_1_1(pair):
    started = [start(host, pair[0], rank, "once") for rank, host in enumerate(pair)]
    for host, process in zip(pair, started, strict=True):
        output, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
        assert "sum 1" in output
        assert f"on {host.name}" in errors
