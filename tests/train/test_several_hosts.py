"""Training on two hosts of two ranks each, started by real launchers; hosts are network namespaces joined by veth."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sockets import listening
from tests.train.test_layouts import curves, write

from tozan import checkpoint
from tozan.chaos import hosts
from tozan.comm.jobs import Job, script
from tozan.comm.monitor import EXIT_LOST
from tozan.config import load
from tozan.train import train

pytestmark = pytest.mark.skipif(not hosts.available(), reason="needs iproute2, and root to make network namespaces")

FLAGS = ["--model.family=gpt2", "--train.micro_batch=2", "--train.steps=3"]
LAYOUT = ["--layout.data=4", "--layout.zero=1"]
TOOLS = str(Path(sys.executable).parent)


@pytest.fixture
def pair():
    with hosts.several(2) as made:
        yield made


def job(config: Path, flags: list[str], **options) -> Job:
    command = (sys.executable, "-m", "tozan", "train", str(config), *flags)
    return Job(command, ranks=4, nodes=2, environment={"OMP_NUM_THREADS": "1"}, **options)


def path_to_tools() -> dict[str, str]:
    return {"PATH": f"{TOOLS}:{os.environ['PATH']}"}


def check_equal(folder: Path, reference: Path) -> None:
    """Bit for bit, in losses, norms and the checkpoint, which both hosts have written into one folder."""
    assert curves(folder) == curves(reference)
    states = [checkpoint.load(checkpoint.resolve(each)) for each in (folder, reference)]
    assert checkpoint.state_hash(states[0].tensors) == checkpoint.state_hash(states[1].tensors)
    parts = checkpoint.resolve(folder).glob("model-rank*.safetensors")
    assert {path.name.split("-")[1] for path in parts} == {f"rank{rank:06d}" for rank in range(4)}


@pytest.mark.timeout(600)
def test_torchrun_and_mpirun_on_two_hosts_train_as_one_process_does(pair, text_data, tmp_path):
    train(load(write(tmp_path / "one", text_data), FLAGS))

    text = script(job(write(tmp_path / "torchrun", text_data), [*FLAGS, *LAYOUT]), "torchrun")
    variables = path_to_tools() | {"MASTER_ADDR": pair[0].name}
    started = [host.start(["bash", "-c", text], **variables) for host in pair]
    said = [process.communicate(timeout=300)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    for rank, errors in enumerate((said[0], said[0], said[1], said[1])):
        assert f"tozan: rank {rank} of 4 on node{rank // 2}: " in errors
    check_equal(tmp_path / "torchrun", tmp_path / "one")

    if not shutil.which("mpirun"):
        pytest.skip("OpenMPI is not installed")
    listed, agent = tmp_path / "hosts", tmp_path / "agent"
    listed.write_text("".join(f"{host.name} slots=2\n" for host in pair))
    # In the place of ssh: `agent HOST COMMAND…`, where mpirun only ever asks for the other host.
    agent.write_text(f'#!/bin/sh\nshift\nexec {shlex.join(pair[1].command(["sh", "-c"]))} "$*"\n')
    agent.chmod(0o755)
    flags = [*FLAGS, *LAYOUT, "--layout.debug=true"]
    text = script(job(write(tmp_path / "mpirun", text_data), flags, hosts=str(listed)), "mpirun")
    process = pair[0].start(["bash", "-c", text], **path_to_tools(), OMPI_MCA_plm_rsh_agent=agent)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, output + errors
    check_equal(tmp_path / "mpirun", tmp_path / "one")


def ranks_on(pair, config: Path, flags: list[str]) -> list[subprocess.Popen]:
    """The four ranks, each started for itself."""
    words = [sys.executable, "-m", "tozan", "train", str(config), *flags]
    common = {"WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": pair[0].name, "MASTER_PORT": 29_411}
    return [
        pair[rank // 2].start(words, RANK=rank, LOCAL_RANK=rank % 2, OMP_NUM_THREADS=1, **common) for rank in range(4)
    ]


@pytest.mark.timeout(400)
def test_a_cut_cable_ends_both_sides_with_a_message_each_that_names_who_is_lost(pair, text_data, tmp_path):
    config = write(tmp_path / "run", text_data)
    flags = [*FLAGS, *LAYOUT, "--train.steps=1000000", "--eval.every=0", "--checkpoint.every=0"]
    ranks = ranks_on(pair, config, flags)
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 200
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < 5:
        assert time.monotonic() < deadline
        assert all(rank.poll() is None for rank in ranks)
        time.sleep(0.1)
    for host in pair:  # rank 0's store and gloo: on the interface between the hosts, or on loopback
        assert {address for address, _ in listening(host)} - {"127.0.0.1"} == {host.address}, listening(host)
    pair[1].unplug()
    cut = time.monotonic()
    errors = [rank.communicate(timeout=60)[1] for rank in ranks]
    assert time.monotonic() - cut < 30
    assert [rank.returncode for rank in ranks] == [EXIT_LOST] * 4
    assert "Traceback" not in "".join(errors)
    sides = [[line for line in "".join(side).splitlines() if " lost" in line] for side in (errors[:2], errors[2:])]
    assert [len(lines) for lines in sides] == [1, 1], sides
    assert "ranks 2, 3 are lost: no sign of life for 12 s" in sides[0][0]
    assert "Everyone waited in " in sides[0][0]
    assert "rank 0 is lost (its store has not answered for 12 s, or this host is cut off); rank 2 was in" in sides[1][0]
