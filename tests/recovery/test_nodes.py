"""Two nodes as network namespaces, an agent on each: one is lost, the run goes on without it, and with it again."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from sockets import connected, listening, reaches

from tozan import checkpoint
from tozan.chaos import hosts
from tozan.config import load
from tozan.recovery.elastic import fitting
from tozan.train import train

STEPS = 120
PORT = 29_471
OPEN = """
import socket, time
s = socket.create_server(("0.0.0.0", 0))
print(s.getsockname()[1], flush=True)
time.sleep(600)
"""


def agents(path: Path, everyone, flags):
    words = [sys.executable, "-m", "tozan", "agent", str(path), *flags]
    return [start(host, words, number, everyone) for number, host in enumerate(everyone)]


def start(host, words, number, everyone):
    variables = {"RANK": number, "WORLD_SIZE": len(everyone), "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    variables["TOZAN_SECRET"] = "of this job"  # as `tozan launch` gives it: the store is signed
    return host.start(words, MASTER_ADDR=everyone[0].name, MASTER_PORT=PORT, **variables)


def events(folder: Path, kind: str) -> list[dict]:
    path = folder / "recovery.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def step(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return max((json.loads(line)["step"] for line in lines[:-1]), default=0)


def wait_until(happened, seconds=200.0):
    end = time.monotonic() + seconds
    while not (found := happened()):
        assert time.monotonic() < end, f"nothing happened for {seconds:.0f} s"
        time.sleep(0.05)
    return found


@pytest.mark.skipif(not hosts.available(), reason="needs root and iproute2")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("layout", [["--layout.zero=2"]], ids=["zero2"])
def test_a_lost_node_costs_a_few_steps_and_no_bit(configure, layout):
    path = configure("hurt")
    hurt = path.with_suffix("")
    with hosts.several(2) as everyone:
        first, second = everyone
        for host in everyone:  # so that a host cannot know by which address the other sees it
            host.add_address("192.168.214.1")
        leading, following = agents(path, everyone, layout)
        wait_until(lambda: step(hurt) >= 20)
        for host in everyone:  # agents, their store, gloo: on the interface between the hosts, or on loopback
            addresses = {address for address, _ in listening(host)}
            assert host.address in addresses
            assert addresses <= {host.address, "127.0.0.1"}, listening(host)
        second.unplug()  # nobody is told: connections are half open
        wait_until(lambda: events(hurt, "rescued"))
        rescued, lost = events(hurt, "rescued")[0], events(hurt, "lost")[0]
        assert rescued["whole"]
        assert 0 <= lost["step"] - rescued["step"] <= 8
        wait_until(lambda: [e for e in events(hurt, "resumed") if e["generation"] > rescued["generation"]])
        wait_until(lambda: step(hurt) >= rescued["step"] + 20)
        remaining = max(pid for pid in first.processes() if b"forkserver" in Path(f"/proc/{pid}/cmdline").read_bytes())
        os.kill(remaining, signal.SIGSTOP)  # or the run may be over before the node is back
        second.plug()
        wait_until(lambda: connected(first, PORT))
        time.sleep(0.5)  # for the agent to see who has come
        os.kill(remaining, signal.SIGCONT)
        _, errors = leading.communicate(timeout=400)
        assert leading.returncode == 0, errors
        assert following.wait(60) == 0
        first_layout, second_layout = events(hurt, "layout")
        assert (first_layout["ranks"], second_layout["ranks"]) == (1, 2), errors
    calm = configure("calm")
    train(load(calm, ["--layout.data=1", "--train.accumulate=4"]))
    ends = [checkpoint.load(checkpoint.resolve(folder)) for folder in (calm.with_suffix(""), hurt)]
    assert ends[0].step == ends[1].step == STEPS
    for end in ends:  # the random generator's state depends on which micro-batches were a rank's own
        del end.tensors["rng/cpu"]
    assert checkpoint.state_hash(ends[0].tensors) == checkpoint.state_hash(ends[1].tensors)
    assert ends[0].meta == ends[1].meta
    steps = [
        r["step"] for r in map(json.loads, (hurt / "metrics.jsonl").read_text().splitlines()) if r["kind"] == "step"
    ]
    assert set(steps) == set(range(1, STEPS + 1))


@pytest.mark.skipif(not hosts.available(), reason="needs root and iproute2")
def test_no_port_of_a_job_on_one_machine_can_be_reached_from_another(configure):
    path = configure("alone")
    with hosts.several(2) as (here, elsewhere):
        words = [sys.executable, "-m", "tozan", "agent", str(path), "--train.steps=100000"]
        control = here.start([sys.executable, "-c", OPEN])
        port = int(control.stdout.readline())
        job = here.start(words)
        wait_until(lambda: step(path.with_suffix("")) >= 3 or job.poll() is not None)
        heard = listening(here)
        ports = {port for _, port in heard}
        assert len(ports) >= 4, heard  # the store, connections of gloo on both ranks, and the control
        assert reaches(elsewhere, here.address, ports) == {port}, heard
        assert ("0.0.0.0", port) in heard


def test_the_nearest_layout_keeps_the_batch_and_gives_up_replicas_first(configure):
    path = configure("shapes")
    wide = ["--layout.data=4", "--layout.tensor=2", "--model.heads=4"]
    assert fitting(path, wide, 8).ranks == 8
    assert fitting(path, wide, 8).flags == ()
    three = fitting(path, wide, 7)  # three replicas do not divide four micro-batches
    assert three.ranks == 4
    assert "--layout.data=2" in three.flags
    assert "--layout.tensor=2" in three.flags
    assert "--train.accumulate=2" in three.flags
    assert "--layout.tensor=1" in fitting(path, wide, 1).flags
    assert fitting(path, wide, 0) is None
