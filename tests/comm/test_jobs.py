import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tozan.comm.jobs import Allocation, Job, allocation, problems, rank_map, script, start
from tozan.errors import UserError

WORKER = str(Path(__file__).with_name("worker.py"))
JOB = Job(("tozan", "train", "my run.toml"), ranks=16, nodes=4, cores=48, minutes=90, queue="large", account="g1")


PLAIN = replace(JOB, cores=0, queue=None, account=None, minutes=0)


def is_valid_bash(text):
    return subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True).returncode == 0


@pytest.mark.parametrize("launcher", ["torchrun", "mpirun", "slurm", "pjm"])
def test_every_script_is_bash_and_quotes_the_command(launcher):
    stage = ("data dir/x",) if launcher == "pjm" else ()
    job = replace(PLAIN, name="a-job", stage=stage, minutes=90, restarts=2, environment={"A": "b c"})
    text = script(job, launcher)
    assert is_valid_bash(text)
    assert "tozan train 'my run.toml'" in text
    assert "export A='b c'" in text


def test_slurm_asks_for_and_binds_what_the_job_says():
    text = script(JOB, "slurm")
    for option in ("--nodes=4", "--ntasks=16", "--ntasks-per-node=4", "--cpus-per-task=12", "--time=01:30:00"):
        assert f"#SBATCH {option}\n" in text
    assert "#SBATCH --partition=large" in text
    assert "#SBATCH --account=g1" in text
    assert "srun --ntasks=16 --ntasks-per-node=4 --kill-on-bad-exit=0 --wait=60 --cpus-per-task=12 --cpu-bind=v" in text
    assert "#SBATCH" not in script(JOB, "slurm", header=False)


def test_pjm_script_has_shape_processes_rank_map_cmgs_and_staging():
    text = script(
        replace(JOB, shape=(2, 1, 2), stage=("data/mine.tar",), environment={"PJM_LLIO_GFSCACHE": "/vol0004"}), "pjm"
    )
    assert "#PJM -x PJM_LLIO_GFSCACHE=/vol0004\n" in text
    for line in ('-L "node=2x1x2:strict"', '-L "elapse=01:30:00"', '-L "rscgrp=large"', '-g "g1"'):
        assert f"#PJM {line}\n" in text
    for line in ('--mpi "proc=16"', '--mpi "max-proc-per-node=4"', '--mpi "rank-map-hostfile=tozan.rankmap"'):
        assert f"#PJM {line}\n" in text
    assert "llio_transfer data/mine.tar\ntrap 'llio_transfer --purge data/mine.tar' EXIT" in text
    assert "export OMP_NUM_THREADS=12\n" in text
    one_cmg = "$((4 + 1 * PLE_RANK_ON_NODE))"
    assert f"numactl --cpunodebind={one_cmg} --membind={one_cmg}" in text
    assert "mpiexec -n 16" in text


@pytest.mark.parametrize(("ranks", "local", "domains"), [(4, 3, "7"), (2, 1, "6-7"), (1, 0, "4-7")])
def test_pjm_binding_names_the_compute_cmgs(ranks, local, domains, tmp_path):
    text = script(Job(("prog", "a b"), ranks=ranks), "pjm")
    binding = next(line for line in text.splitlines() if line.startswith("bind="))
    tool = tmp_path / "numactl"
    tool.write_text('#!/bin/bash\nprintf "%s|" "$@"\n')
    tool.chmod(0o755)
    e = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PLE_RANK_ON_NODE": str(local)}
    said = subprocess.run(
        ["bash", "-c", f'{binding}\nbash -c "$bind" -- prog "a b"'], env=e, capture_output=True, text=True
    )
    assert said.stdout == f"--cpunodebind={domains}|--membind={domains}|prog|a b|"


def test_rank_map_fills_nodes_and_walks_the_shape_in_the_order_asked_for():
    lines = rank_map(Job(("x",), ranks=12, nodes=6, shape=(3, 2))).split()
    assert lines[:6] == ["(0,0)", "(0,0)", "(0,1)", "(0,1)", "(1,0)", "(1,0)"]
    turned = rank_map(Job(("x",), ranks=12, nodes=6, shape=(3, 2), order=(1, 0))).split()
    assert turned[:6] == ["(0,0)", "(0,0)", "(1,0)", "(1,0)", "(2,0)", "(2,0)"]
    assert sorted(lines) == sorted(turned)


@pytest.mark.parametrize(
    ("job", "launcher", "given", "message"),
    [
        (replace(JOB, ranks=15), "slurm", None, "15 ranks on 4 nodes"),
        (replace(PLAIN, cores=2), "mpirun", None, "4 ranks on nodes of 2 cores"),
        (replace(JOB, shape=(2, 3)), "pjm", None, "2 × 3 = 6, but nodes = 4"),
        (replace(JOB, ranks=12), "pjm", None, "3 ranks per node: a node has 4 CMGs"),
        (replace(JOB, shape=(2, 2), order=(0, 0)), "pjm", None, "does not name each"),
        (JOB, "lsf", None, "launcher 'lsf' is none of"),
        (PLAIN, "mpirun", Allocation("slurm", 4, 16), "asked for mpirun inside a slurm allocation"),
        (JOB, "slurm", Allocation("slurm", 2, 16), "asked for 4 nodes, the allocation has 2"),
        (replace(JOB, ranks=8), "slurm", Allocation("slurm", 4, 4), "asked for 8 ranks, the allocation has 4"),
        (replace(JOB, name="a\nb"), "slurm", None, "line break"),
    ],
)
def test_refuses_contradictions(job, launcher, given, message):
    assert message in "\n".join(map(str, problems(job, launcher, given)))


OPTIONS = {
    "cores": (24, "--cores 24"),
    "queue": ("large", "--queue large"),
    "account": ("g1", "--account g1"),
    "shape": ((2, 2), "--shape 2x2"),
    "stage": (("a", "b"), "--stage a b"),
    "hosts": ("nodes.txt", "--hosts nodes.txt"),
}
TAKEN = {
    "torchrun": set(),
    "mpirun": {"cores", "hosts"},
    "slurm": {"cores", "queue", "account"},
    "pjm": {"queue", "account", "shape", "stage"},
}


@pytest.mark.parametrize("launcher", TAKEN)
def test_an_option_changes_the_script_or_is_refused_by_name_and_all_at_once(launcher):
    values = {name: value for name, (value, _) in OPTIONS.items()}
    said = [str(problem) for problem in problems(replace(PLAIN, **values), launcher)]
    refused = {name for name, (_, flag) in OPTIONS.items() if any(f"{launcher} would ignore {flag}" in s for s in said)}
    assert refused == set(OPTIONS) - TAKEN[launcher]
    assert len(said) == len(refused)
    plain = script(PLAIN, launcher)
    for name in TAKEN[launcher]:
        assert script(replace(PLAIN, **{name: values[name]}), launcher) != plain, name
    for changed in ({"minutes": 90}, {"restarts": 2}, {"environment": {"A": "b"}}):
        assert script(replace(PLAIN, **changed), launcher) != plain


def test_inside_an_allocation_what_asks_for_one_is_refused():
    said = "\n".join(map(str, problems(replace(JOB, shape=(2, 2)), "pjm", Allocation("pjm", 4, 16))))
    for flag in ("--queue large", "--account g1", "--minutes 90", "--shape 2x2"):
        assert f"pjm would ignore {flag}: the allocation" in said
    assert not problems(replace(PLAIN, cores=48), "pjm", Allocation("pjm", 4, 16))


def test_torchrun_starts_no_agents_of_several_nodes():
    assert not problems(replace(PLAIN, nodes=1, agents=True), "torchrun")
    assert "leave --agent out" in str(problems(replace(PLAIN, agents=True), "torchrun")[0])


@pytest.mark.parametrize(
    ("statuses", "starts", "status"),
    [
        ([14, 137, 0], 3, 0),
        ([139, 14, 14, 0], 3, 14),  # no more than two restarts
        ([75], 1, 75),
        ([2], 1, 2),
        ([143], 1, 143),
        ([130], 1, 130),
        ([0], 1, 0),
    ],
)
@pytest.mark.parametrize("launcher", ["mpirun", "pjm", "slurm"])
def test_a_lost_rank_starts_the_job_again_as_often_as_asked(launcher, statuses, starts, status, tmp_path):
    """Launchers are played by a script that leaves with one status after the other; Slurm itself starts anew."""
    fake = tmp_path / {"mpirun": "mpirun", "pjm": "mpiexec", "slurm": "srun"}[launcher]
    codes = " ".join(map(str, statuses))
    fake.write_text(f"#!/bin/bash\ncodes=({codes})\necho >> starts\nexit ${{codes[$(wc -l < starts) - 1]}}\n")
    (tmp_path / "scontrol").write_text("#!/bin/bash\ntouch requeued\n")
    for tool in (fake, tmp_path / "scontrol"):
        tool.chmod(0o755)
    text = script(Job(("prog",), ranks=2, restarts=2), launcher)
    e = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "1"}
    for restart in range(9):
        (tmp_path / "requeued").unlink(missing_ok=True)
        done = subprocess.run(["bash", "-c", text], env=e | {"SLURM_RESTART_COUNT": str(restart)}, cwd=tmp_path)
        if launcher != "slurm" or not (tmp_path / "requeued").exists() or status == 75:
            break
    assert ((tmp_path / "starts").read_text().count("\n"), done.returncode) == (starts, status)
    assert (tmp_path / "requeued").exists() == (launcher == "slurm" and status == 75)


def test_a_time_limit_asks_the_ranks_to_save(tmp_path):
    (tmp_path / "mpirun").write_text("#!/bin/bash\ntrap 'exit 75' USR1\nsleep 30 & wait\n")
    (tmp_path / "mpirun").chmod(0o755)
    text = script(Job(("prog",), ranks=2, minutes=1), "mpirun").replace(" 1m ", " 0.1s ")
    e = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    assert subprocess.run(["bash", "-c", text], env=e, timeout=20).returncode == 75


def test_detects_the_allocation():
    assert allocation({}) is None
    assert allocation({"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "8"}) == Allocation(
        "slurm", 2, 8
    )
    assert allocation({"SLURM_JOB_ID": "1"}) == Allocation("slurm", 1, None)
    assert allocation({"PJM_JOBID": "1", "PJM_NODE": "12", "PJM_MPI_PROC": "48"}) == Allocation("pjm", 12, 48)


def test_dry_run_prints_and_starts_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert start(replace(JOB, shape=(2, 2)), "pjm", dry_run=True, folder=tmp_path) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("#!/bin/bash\n#PJM -N tozan\n")
    assert printed.endswith("(1,1)\n")
    assert not list(tmp_path.iterdir())


def test_says_when_a_launcher_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="pjsub is not installed"):
        start(Job(("x",), ranks=1), "pjm", folder=tmp_path)


@pytest.mark.skipif(not shutil.which("mpirun"), reason="needs OpenMPI")
def test_starts_the_real_mpirun_from_a_description(tmp_path):
    job = Job(
        (sys.executable, WORKER, "2", "once"), ranks=2, environment={"OMPI_MCA_btl_vader_single_copy_mechanism": "none"}
    )
    done = subprocess.run(
        [sys.executable, "-c", f"from tozan.comm.jobs import *; raise SystemExit(start({job!r}, 'mpirun'))"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("sum 1") == 2
