import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forked import Forked

from tozan.comm import launch
from tozan.comm.monitor import EXIT_LOST
from tozan.comm.place import Place, check, expand_counts, expand_hosts, find, interface_to
from tozan.errors import UserError
from tozan.layout import Layout

WORKER = str(Path(__file__).with_name("worker.py"))


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(ranks, role, absent=(), **variables):
    port = free_port()
    processes = []
    for rank in sorted({*range(ranks)} - {*absent}):
        e = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks}
        e |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1} | variables
        processes.append(Forked([WORKER, ranks, role], **e))
    return processes


def end(processes, within):
    deadline, outputs = time.monotonic() + within, []
    try:
        for process in processes:
            outputs.append(process.communicate(timeout=max(0.1, deadline - time.monotonic())))
    finally:
        for process in processes:
            process.kill()
    return outputs


@pytest.mark.parametrize("victim", [0, 2])
def test_of_ranks_that_are_started_again_one_says_whose_process_ended_and_all_leave_at_once(victim):
    processes = start(3, "loop", TORCHELASTIC_RUN_ID="x", TORCHELASTIC_MAX_RESTARTS="3")
    for process in processes:
        assert process.stdout.readline().startswith("rank")
    processes[victim].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    outputs = end(processes, within=30)
    assert time.monotonic() - killed < 10  # and not for the heartbeat's verdict
    survivors = [rank for rank in range(3) if rank != victim]
    assert [processes[rank].returncode for rank in survivors] == [EXIT_LOST] * 2
    text = "".join(outputs[rank][1] for rank in survivors)
    messages = [line for line in text.splitlines() if "lost" in line or "failed" in line]
    assert len(messages) == 1, text
    known = f"tozan: rank {victim} (process {processes[victim].pid}) is lost; rank"
    if victim == 0:  # which held the store: the heartbeat may notice first
        known = f"({re.escape(known)}|tozan: rank 0 is lost .its store is gone)"
    else:
        known = re.escape(known)
        assert re.search(r"failed: (Connection|Read|Write|Socket)[^!]*$", messages[0]), messages[0]
    assert re.match(known, messages[0]), messages[0]
    assert "all_reduce 'loop'" in messages[0]
    assert "Traceback" not in text
    assert "frame #" not in text  # nor the stacks of torch's C++ side


ALONE = {"LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
"""Of a rank that is the only one of its machine: without the store, nothing is left to agree in on who speaks."""


@pytest.mark.parametrize(("victim", "variables"), [(0, ALONE), (2, {})])
def test_after_sigkill_of_a_rank_the_others_end_with_one_message_and_no_traceback(victim, variables):
    processes = start(3, "loop", LOST=1.5, **variables)
    for process in processes:
        assert process.stdout.readline().startswith("rank")
    processes[victim].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    outputs = end(processes, within=30)
    assert time.monotonic() - killed < 30
    survivors = [rank for rank in range(3) if rank != victim]
    assert [processes[rank].returncode for rank in survivors] == [EXIT_LOST] * 2
    text = "".join(outputs[rank][1] for rank in survivors)
    messages = [line for line in text.splitlines() if "lost" in line]
    assert len(messages) == 1, text
    assert f"rank {victim} is lost" in messages[0]
    assert "all_reduce 'loop'" in messages[0]
    assert "Traceback" not in text
    assert "frame #" not in text  # nor the stacks of torch's C++ side


def test_a_hang_names_the_rank_that_did_not_come_and_the_operation_and_a_slow_start_is_none():
    processes = start(3, "idle", TIMEOUT=1, START=60, LATE=1.7, LOST=2)
    text = "".join(error for _, error in end(processes, within=45))
    assert [process.returncode for process in processes] == [EXIT_LOST] * 3
    messages = [line for line in text.splitlines() if "hang" in line]
    assert len(messages) == 1, text
    assert "rank 1 did not come" in messages[0]
    assert re.search(r"Everyone waited for [12] s", messages[0]), messages[0]
    assert "all_reduce 'loop 0' (number 1 over dp: ranks 0, 1, 2)" in messages[0]
    assert "Traceback" not in text


@pytest.mark.parametrize(("warm", "patience"), [(False, 600), (True, 120)])
def test_ranks_that_have_started_before_are_waited_for_less_long(monkeypatch, warm, patience):
    asked = []

    def gather(_place, _timeout_s, start_s, _lost_after_s):
        asked.append(start_s)
        raise InterruptedError

    monkeypatch.setattr(launch, "_gather", gather)
    with (
        pytest.raises(InterruptedError),
        launch.join(Layout(dp=2), place=Place(0, 2, warm=warm), timeout_s=120, start_s=600),
    ):
        pass
    assert asked == [patience]


def test_a_rank_that_does_not_come_is_named_in_one_line():
    processes = start(3, "once", absent=[1], TIMEOUT=4)
    text = "".join(error for _, error in end(processes, within=60))
    assert [process.returncode for process in processes] == [EXIT_LOST] * 2
    assert len([line for line in text.splitlines() if "tozan: rank 1 did not come to 127.0.0.1:" in line]) == 1, text
    assert "Traceback" not in text
    assert "frame #" not in text


def test_a_rank_that_comes_and_dies_before_it_has_joined_is_named_in_one_line():
    processes = start(3, "dies", LOST=1)
    text = "".join(error for _, error in end(processes, within=30))
    assert [process.returncode for process in processes] == [EXIT_LOST, 9, EXIT_LOST]
    messages = [line for line in text.splitlines() if "lost" in line or "join" in line]
    assert len(messages) == 1, text
    assert "rank 1 is lost: no sign of life for 1 s (last seen in the start, where ranks join)" in messages[0]
    assert "Traceback" not in text


def test_a_port_in_use_is_a_mistake_of_the_user():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        rank = start(2, "once", MASTER_PORT=taken.getsockname()[1])[0]
        error = end([rank], within=60)[0][1]
    assert rank.returncode == 2
    assert "rank 0 cannot listen on 127.0.0.1:" in error
    assert "Address already in use" in error


def test_an_error_of_one_rank_ends_the_others_soon():
    processes = start(3, "fail")
    outputs = end(processes, within=30)
    assert [process.returncode for process in processes] == [EXIT_LOST, 1, EXIT_LOST]
    assert "KeyError: 'wrong'" in outputs[1][1]
    text = outputs[0][1] + outputs[2][1]
    assert "rank 1 did not come" in text
    assert "rank 1: left the run (KeyError: 'wrong')" in text
    assert "Traceback" not in text


@pytest.mark.skipif(not shutil.which("mpirun"), reason="needs OpenMPI")
def test_mpirun_starts_ranks_that_find_each_other_and_their_cores():
    e = {name: value for name, value in os.environ.items() if not name.startswith(("RANK", "WORLD", "MASTER"))}
    command = ["mpirun", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-np", "2"]
    done = subprocess.run(
        [*command, sys.executable, WORKER, "2", "once"], env=e, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    # mpirun may forward two ranks' lines in pieces.
    assert sorted(re.findall(r"rank \d: sum \d", done.stdout)) == ["rank 0: sum 1", "rank 1: sum 1"]
    assert done.stderr.count("bound by tozan") == 2
    wrong = subprocess.run(
        [*command, sys.executable, WORKER, "4", "once"], env=e, capture_output=True, text=True, timeout=240
    )
    assert "asks for 4 ranks, but there are 2 ranks started by mpirun" in wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_torchrun_starts_ranks():
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", WORKER, "2", "once"],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("sum 1") == 2


def test_finds_the_place_in_every_launchers_environment():
    assert find({}) == Place()
    torchrun = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a"}
    torchrun |= {"MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    assert find(torchrun) == Place(3, 8, 1, 2, "a", 29500, "torchrun", True)
    mpi = {
        f"OMPI_COMM_WORLD_{k}": v for k, v in (("RANK", "5"), ("SIZE", "8"), ("LOCAL_RANK", "1"), ("LOCAL_SIZE", "4"))
    }
    with pytest.raises(UserError, match="MASTER_ADDR is not set"):
        find(mpi)
    there = {"MASTER_ADDR": "n1", "MASTER_PORT": "7"}
    agent = torchrun | {"TOZAN_AGENT": '{"generation": 4, "warm": true}'}
    assert find(agent) == Place(3, 8, 1, 2, "a", 29500, "agent", True, generation=4, restarts=True, warm=True)
    assert find(mpi | there) == Place(5, 8, 1, 4, "n1", 7, "mpirun")
    fugaku = {"PJM_JOBID": "9", "PJM_NODE": "2", "PJM_MPI_PROC": "8", "PMIX_RANK": "6", "PLE_RANK_ON_NODE": "2"}
    assert find(fugaku | there) == Place(6, 8, 2, 4, "n1", 7, "pjm")
    slurm = {"SLURM_PROCID": "2", "SLURM_NTASKS": "3", "SLURM_LOCALID": "0", "SLURM_NODEID": "1", "SLURM_STEP_ID": "0"}
    slurm |= {"SLURM_STEP_TASKS_PER_NODE": "2,1", "SLURM_STEP_NODELIST": "n[08-09]", "SLURM_JOB_ID": "12"}
    place = find(slurm)
    assert (place.rank, place.local_size, place.master, place.launcher) == (2, 1, "n08", "slurm")
    assert 20_000 <= place.port < 32_000
    assert place.port != find(slurm | {"SLURM_JOB_ID": "13"}).port
    with pytest.raises(UserError, match="contradict"):
        find(torchrun | {"RANK": "8"})


def test_slurm_lists():
    assert expand_hosts("a[01-03,7]-x,login") == ["a01-x", "a02-x", "a03-x", "a7-x", "login"]
    assert expand_hosts("r[1-2]n[3-4]") == ["r1n3", "r1n4", "r2n3", "r2n4"]
    assert expand_counts("2(x3),1") == [2, 2, 2, 1]


def test_refuses_a_job_of_another_size():
    check(4, Place(world_size=4))
    with pytest.raises(UserError, match="asks for 8 ranks, but there are 4 ranks started by slurm"):
        check(8, Place(world_size=4, launcher="slurm"))
    with pytest.raises(UserError, match="asks for 2 ranks, but there is 1 process, started without a launcher"):
        check(2, Place())
    with pytest.raises(UserError, match="there are 4 processes, started without a launcher"):
        check(2, Place(world_size=4))


def test_interface_of_the_loopback_address():
    assert interface_to("127.0.0.1") == "lo"
