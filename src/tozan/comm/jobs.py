"""One description of a job, started under torchrun, OpenMPI's mpirun, Slurm or PJM (Fugaku); torch-free.

`script(job, launcher)` is the text; `start(job, ...)` finds out where it is (inside an allocation or not), refuses what
contradicts it, and runs or submits. Ranks are bound by the launcher where it can do so plainly and say so; else each
rank binds itself (see `binding`). Scripts for torchrun, mpirun (OpenMPI 4.1) and Slurm are tested against the real
thing or bash; those for PJM by their text only.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Literal, get_args

from tozan.amounts import many
from tozan.comm.place import VARIABLE, expand_counts
from tozan.errors import EXIT_AGAIN, EXIT_LOST, Problem, UserError
from tozan.layout import walk

Launcher = Literal["torchrun", "mpirun", "slurm", "pjm"]
_PORT = 29_400
_SECRET = f'export {VARIABLE}="${{{VARIABLE}:-$(od -An -N32 -tx1 /dev/urandom | tr -d " \\n")}}"'
"""Made anew for every job, and passed on in the environment, which only the user and root can read."""
_FIRST_COMPUTE_DOMAIN = 4
"""On Fugaku NUMA nodes 0 to 3 hold the assistant cores, 4 to 7 the four CMGs that compute."""
_CMGS, _CMG_CORES = 4, 12
_BATCH: tuple[Launcher, ...] = ("slurm", "pjm")
_DEFAULT_MINUTES = 60
_LOSSES = f"{EXIT_LOST} | 13[4-79]"
"""Bash pattern of a lost rank's exit statuses: what the others leave with, or 128 + SIGABRT, BUS, FPE, KILL or SEGV."""
_OPTIONS: Mapping[str, tuple[tuple[Launcher, ...], str, str]] = {
    "cores": (
        ("mpirun", "slurm", "pjm"),
        "its ranks share out all cores that their node leaves them",
        "leave it out; `taskset -c 0-47 tozan launch …` keeps all of them on some cores, train.threads limits threads",
    ),
    "queue": (_BATCH, "it has no queues", "leave it out, or use --launcher slurm or pjm"),
    "account": (_BATCH, "it keeps no accounts", "leave it out, or use --launcher slurm or pjm"),
    "shape": (("pjm",), "it cannot choose where nodes stand", "leave it out, or use --launcher pjm"),
    "stage": (
        ("pjm",),
        "it copies no files to the nodes' storage",
        "leave it out, copy the data to a local disk of every node yourself and set data.path to it",
    ),
    "hosts": (
        ("mpirun",),
        "it takes no list of machines",
        "leave it out (a batch system chooses its nodes; torchrun is started on each), or use --launcher mpirun",
    ),
}
"""Options that not every launcher can act on: who does, why others cannot, and what to write instead."""


@dataclass(frozen=True)
class Job:
    """What to start, whoever starts it.

    Attributes:
        command: program and arguments of every rank.
        ranks: processes in all; a multiple of `nodes`.
        nodes: machines.
        cores: cores of a node that ranks may use; 0 leaves it to the launcher (on PJM: 48).
        name: of the job.
        minutes: time limit of each start; 0: an hour under a batch system, else none.
        queue: Slurm's partition, PJM's resource group.
        account: Slurm's account, PJM's group.
        shape: PJM's node shape, such as (2, 3, 2); its product is `nodes`.
        order: mesh of nodes that neighbouring ranks walk through, as a permutation of the shape's dims (fastest last).
        stage: files that every rank reads at the start: copied to the nodes' storage first (`llio_transfer`).
        environment: further variables; on PJM those named `PJM_…` go to the job itself (`#PJM -x`), such as
            PJM_LLIO_GFSCACHE, the volumes that it uses.
        hosts: file of host names, for mpirun on several nodes outside an allocation.
        agents: each process is an agent that survives the loss of other nodes.
        restarts: times that the job is started again after a rank was lost.
    """

    command: tuple[str, ...]
    ranks: int
    nodes: int = 1
    cores: int = 0
    name: str = "tozan"
    minutes: int = 0
    queue: str | None = None
    account: str | None = None
    shape: tuple[int, ...] = ()
    order: tuple[int, ...] = ()
    stage: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    hosts: str | None = None
    agents: bool = False
    restarts: int = 0

    @property
    def per_node(self) -> int:
        """Ranks of a node."""
        return self.ranks // self.nodes

    @property
    def cores_per_rank(self) -> int:
        """Cores of a rank; 0 if not known."""
        return self.cores // self.per_node


@dataclass(frozen=True)
class Allocation:
    """What a batch system has given to the shell that tozan runs in.

    Attributes:
        launcher: `slurm` or `pjm`.
        nodes: machines.
        ranks: processes it was asked for; None if the job did not say.
    """

    launcher: Launcher
    nodes: int
    ranks: int | None


def allocation(environment: Mapping[str, str] | None = None) -> Allocation | None:
    """The allocation that this process runs in, or None outside of one."""
    e = os.environ if environment is None else environment
    if "PJM_JOBID" in e and "PJM_NODE" in e:
        return Allocation("pjm", int(e["PJM_NODE"]), int(e["PJM_MPI_PROC"]) if "PJM_MPI_PROC" in e else None)
    if "SLURM_JOB_ID" in e:
        ranks = int(e["SLURM_NTASKS"]) if "SLURM_NTASKS" in e else None
        if ranks is None and "SLURM_TASKS_PER_NODE" in e and "SLURM_NTASKS_PER_NODE" in e:
            ranks = sum(expand_counts(e["SLURM_TASKS_PER_NODE"]))
        return Allocation("slurm", int(e.get("SLURM_JOB_NUM_NODES", "1")), ranks)
    return None


def problems(job: Job, launcher: str, given: Allocation | None = None) -> list[Problem]:
    """Everything that is wrong with a job under a launcher, and inside an allocation if there is one."""
    found = []

    def wrong(what: str, fix: str) -> None:
        found.append(Problem("launch", what, fix))

    if launcher not in get_args(Launcher):
        wrong(f"launcher {launcher!r} is none of {', '.join(get_args(Launcher))}", "choose one of them")
    else:
        found += _ignored(job, launcher, given)
    if job.ranks < 1 or job.nodes < 1 or job.ranks % job.nodes:
        nearest = max(1, round(job.ranks / max(1, job.nodes))) * max(1, job.nodes)
        what = f"{many(job.ranks, 'rank')} on {many(job.nodes, 'node')}: each node must get the same number"
        wrong(what, f"ask for {many(nearest, 'rank')}")
        return found
    if job.cores and job.per_node > job.cores:
        wrong(
            f"{many(job.per_node, 'rank')} on nodes of {many(job.cores, 'core')}: each needs one",
            "use more nodes or fewer ranks",
        )
    if any("\n" in text for text in (*job.command, *job.stage, job.name, job.queue or "", job.account or "")):
        wrong("a line break in a name or an argument", "leave it out")
    if launcher == "pjm":
        if job.shape and prod(job.shape) != job.nodes:
            sides = " × ".join(map(str, job.shape))
            wrong(f"node shape {sides} = {prod(job.shape)}, but nodes = {job.nodes}", f"set nodes = {prod(job.shape)}")
        if job.per_node not in (1, 2, _CMGS):
            wrong(f"{job.per_node} ranks per node: a node has {_CMGS} CMGs", "use 1, 2 or 4 ranks per node")
    if job.order and sorted(job.order) != list(range(len(job.shape))):
        dims = ", ".join(map(str, range(len(job.shape))))
        wrong(f"order {job.order} does not name each of the shape's dims ({dims}) once", f"write {dims}")
    if given is None:
        return found
    if given.launcher != launcher:
        wrong(f"asked for {launcher} inside a {given.launcher} allocation", "leave the launcher out")
    if given.nodes != job.nodes:
        wrong(f"asked for {many(job.nodes, 'node')}, the allocation has {given.nodes}", f"set nodes = {given.nodes}")
    if given.ranks is not None and given.ranks != job.ranks:
        wrong(
            f"asked for {many(job.ranks, 'rank')}, the allocation has {given.ranks}",
            "change the layout or the allocation",
        )
    return found


def _ignored(job: Job, launcher: str, given: Allocation | None) -> Iterator[Problem]:
    """Options that would change nothing."""

    def ignored(name: str, why: str, instead: str) -> Problem:
        value = getattr(job, name)
        shown = "x".join(map(str, value)) if name == "shape" else " ".join(value) if name == "stage" else value
        return Problem("launch", f"{launcher} would ignore --{name} {shown}: {why}", instead)

    for name, (takers, why, instead) in _OPTIONS.items():
        if getattr(job, name) and launcher not in takers:
            yield ignored(name, why, instead)
    if launcher == "pjm" and job.cores not in (0, _CMGS * _CMG_CORES):
        yield ignored("cores", f"ranks get all {_CMG_CORES} cores of their CMGs", "leave it out")
    if given is not None:
        for name in ("queue", "account", "minutes", "shape"):
            if getattr(job, name) and (name not in _OPTIONS or launcher in _OPTIONS[name][0]):
                yield ignored(name, "the allocation that this shell is in was given already", "leave it out")
    if job.agents and launcher == "torchrun" and job.nodes > 1:
        yield Problem(
            "launch",
            "torchrun cannot start the --agent of several nodes: its own agents answer at MASTER_ADDR:MASTER_PORT",
            "use --launcher mpirun, slurm or pjm, or leave --agent out and use --restarts",
        )


def script(job: Job, launcher: Launcher, *, header: bool = True) -> str:
    """The shell script that starts a job.

    Args:
        job: what to start.
        launcher: under whom.
        header: with the lines that ask the batch system for nodes; without them to run inside an allocation.

    Raises:
        UserError: the job does not fit the launcher.
    """
    found = problems(job, launcher)
    if found:
        raise UserError(*found)
    lines = ["#!/bin/bash"]
    if header and launcher == "slurm":
        lines += _slurm_header(job)
    if header and launcher == "pjm":
        lines += _pjm_header(job)
    lines += ["set -euo pipefail"]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in job.environment.items()]
    if job.nodes == 1 or launcher != "torchrun":
        lines.append(_SECRET)
    if job.cores_per_rank and launcher != "pjm":  # there the CMGs say it
        lines.append(f"export OMP_NUM_THREADS={job.cores_per_rank}")
    body = {"torchrun": _torchrun, "mpirun": _mpirun, "slurm": _slurm, "pjm": _pjm}[launcher]
    return "\n".join([*lines, *body(job), ""])


def rank_map(job: Job) -> str:
    """PJM's rank map file: the node of every rank as `(x,y,z)`, one line each.

    Ranks fill a node first, then walk through the shape with the last dim of `order` fastest, so that neighbouring
    ranks, and with them tensor-parallel groups, are neighbours in the torus.
    """
    lines = []
    for coordinates in walk(job.shape or (job.nodes,), job.order):
        lines += [f"({','.join(map(str, coordinates))})"] * job.per_node
    return "\n".join([*lines, ""])


def start(job: Job, launcher: Launcher | None = None, *, dry_run: bool = False, folder: Path = Path()) -> int:
    """Run a job here, or hand it to the batch system.

    Inside an allocation it runs there. Outside, Slurm and PJM get the script (`<name>.slurm.sh`, `<name>.pjm.sh` in
    `folder`, and `<name>.rankmap`), torchrun and mpirun run at once. Default launcher: that of the allocation, else
    the batch system whose command is installed, else torchrun.

    Args:
        job: what to start.
        launcher: under whom.
        dry_run: print the script (and the rank map) and start nothing.
        folder: where scripts are written.

    Returns:
        The exit status.

    Raises:
        UserError: the job contradicts itself, the launcher or the allocation, or the launcher is not installed.
    """
    given = allocation()
    chosen: Launcher = launcher or (given.launcher if given else _installed())
    found = problems(job, chosen, given)
    if found:
        raise UserError(*found)
    text = script(job, chosen, header=given is None)
    if dry_run:
        print(text + (f"# {job.name}.rankmap\n{rank_map(job)}" if chosen == "pjm" else ""), end="")
        return 0
    path = folder / f"{job.name}.{chosen}.sh"
    path.write_text(text, encoding="utf-8")
    if chosen == "pjm":
        (folder / f"{job.name}.rankmap").write_text(rank_map(job), encoding="utf-8")
    submit = {"slurm": "sbatch", "pjm": "pjsub"}.get(chosen, "bash") if given is None else "bash"
    needed = submit if submit != "bash" else {"slurm": "srun", "pjm": "mpiexec"}.get(chosen, chosen)
    if shutil.which(needed) is None:
        fix = "install it, choose another launcher, or use --dry-run to see the script"
        raise UserError(Problem("launch", f"{needed} is not installed here", fix))
    return subprocess.run([submit, str(path.resolve())], check=False, cwd=folder).returncode


def _installed() -> Launcher:
    for command, launcher in (("sbatch", "slurm"), ("pjsub", "pjm")):
        if shutil.which(command):
            return launcher  # type: ignore[return-value]
    return "torchrun"


def _time(job: Job) -> str:
    minutes = job.minutes or _DEFAULT_MINUTES
    return f"{minutes // 60:02d}:{minutes % 60:02d}:00"


def _limit(job: Job, signal: str) -> str:
    """Where no batch system does it: ask a job to save and leave when its time is up, and end it two minutes later."""
    if not job.minutes:
        return ""
    return f"timeout --foreground --preserve-status --signal={signal} --kill-after=2m {job.minutes}m "


def _again(job: Job, command: str) -> list[str]:
    """Lines that run a command, and again after a loss, but not after an error of its own or a signal to end."""
    if not job.restarts:
        return [command]
    return [
        f"for ((left = {job.restarts}; ; left--)); do",
        "    status=0",
        f"    {command} || status=$?",
        f'    case "$status" in {_LOSSES}) ((left == 0)) || continue ;; esac',
        '    exit "$status"',
        "done",
    ]


def _torchrun(job: Job) -> list[str]:
    # Restarts after a killed rank meet stale addresses in the shared store unless this is set.
    lines = ["export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"]
    where = "--standalone"
    if job.nodes > 1:
        lines.append("# start this on every node, with MASTER_ADDR the name of the first")
        lines.append(f"# and {VARIABLE} the same 64 random hexadecimal digits")
        where = f"--nnodes={job.nodes} --rdzv-backend=c10d --rdzv-id={shlex.quote(job.name)}"
        where += f' --rdzv-endpoint="${{MASTER_ADDR:?name of the first node}}:{_PORT}"'
    where += f" --max-restarts={job.restarts}"
    where += f" --nproc-per-node={job.per_node} --no-python"
    return [*lines, f"exec {_limit(job, 'TERM')}torchrun {where} {shlex.join(job.command)}"]


def _mpirun(job: Job) -> list[str]:
    options = [f"-np {job.ranks} -x {VARIABLE}"]
    lines = []
    if job.hosts:
        options.append(f"--hostfile {shlex.quote(job.hosts)}")
        first = f"$(awk '!/^#/ && NF {{print $1; exit}}' {shlex.quote(job.hosts)})"
        lines += [f'export MASTER_ADDR="{first}" MASTER_PORT={_PORT}']
        options.append("-x MASTER_ADDR -x MASTER_PORT")
    if job.cores_per_rank:
        options.append(f"--map-by ppr:{job.per_node}:node:PE={job.cores_per_rank} --bind-to core --report-bindings")
        options.append("-x OMP_NUM_THREADS")
    else:  # by default mpirun gives each of two ranks a single core; each rank binds itself instead
        options.append(f"--map-by ppr:{job.per_node}:node --oversubscribe --bind-to none")
    if os.geteuid() == 0:
        options.append("--allow-run-as-root")
    options += [f"-x {name}" for name in job.environment]
    command = f"{_limit(job, 'USR1')}mpirun {' '.join(options)} {shlex.join(job.command)}"
    return lines + (_again(job, command) if job.restarts else [f"exec {command}"])


def _slurm_header(job: Job) -> list[str]:
    options = [f"--job-name={job.name}", f"--nodes={job.nodes}", f"--ntasks={job.ranks}"]
    options += [f"--ntasks-per-node={job.per_node}"]
    if job.cores_per_rank:
        options.append(f"--cpus-per-task={job.cores_per_rank}")
    options += [f"--time={_time(job)}", f"--output={job.name}-%j.out"]
    options += ["--signal=USR1@120", "--requeue", "--open-mode=append", *(["--no-kill"] if job.agents else [])]
    options += [f"--partition={job.queue}"] if job.queue else []
    options += [f"--account={job.account}"] if job.account else []
    return [f"#SBATCH {option}" for option in options]


def _slurm(job: Job) -> list[str]:
    # Ranks that stop leave together by themselves; one that is killed for leaving second would spoil the exit status.
    options = f"--ntasks={job.ranks} --ntasks-per-node={job.per_node} --kill-on-bad-exit=0"
    options += " --wait=0 --no-kill" if job.agents else " --wait=60"
    if job.cores_per_rank:
        options += f" --cpus-per-task={job.cores_per_rank} --cpu-bind=verbose,cores --distribution=block:block"
    else:
        options += " --cpu-bind=none"
    return [
        "status=0 again=",
        f"srun {options} {shlex.join(job.command)} || status=$?",
        'case "$status" in',
        f"    {EXIT_AGAIN}) again=1 ;;",
        f'    {_LOSSES}) [ "${{SLURM_RESTART_COUNT:-0}}" -ge {job.restarts} ] || again=1 ;;',
        "esac",
        '[ -z "$again" ] || scontrol requeue "$SLURM_JOB_ID"',
        'exit "$status"',
    ]


def _pjm_header(job: Job) -> list[str]:
    shape = "x".join(map(str, job.shape)) + ":strict" if job.shape else str(job.nodes)
    lines = [f"-N {job.name}", f'-L "node={shape}"', f'-L "elapse={_time(job)}"']
    lines += [f'-L "rscgrp={job.queue}"'] if job.queue else []
    lines += [f'-g "{job.account}"'] if job.account else []
    lines += [f'--mpi "proc={job.ranks}"', f'--mpi "max-proc-per-node={job.per_node}"']
    lines += [f"-x {name}={value}" for name, value in job.environment.items() if name.startswith("PJM_")]
    lines += [f'--mpi "rank-map-hostfile={job.name}.rankmap"', "-j", "-S"]
    return [f"#PJM {line}" for line in lines]


def _pjm(job: Job) -> list[str]:
    lines = [f"export OMP_NUM_THREADS={_CMGS // job.per_node * _CMG_CORES}"]
    lines += ['export MASTER_ADDR="$(hostname -i | cut -d" " -f1)" MASTER_PORT=' + str(_PORT)]
    staged = shlex.join(job.stage)
    if staged:
        lines.append(f"llio_transfer {staged}")
        lines.append(f"trap 'llio_transfer --purge {staged}' EXIT")
    cmgs, first = _CMGS // job.per_node, _FIRST_COMPUTE_DOMAIN
    low = f"$(({first} + {cmgs} * PLE_RANK_ON_NODE))"
    domains = low if cmgs == 1 else f"{low}-$(({first + cmgs - 1} + {cmgs} * PLE_RANK_ON_NODE))"
    mpiexec = (
        f"mpiexec -n {job.ranks} -x MASTER_ADDR -x MASTER_PORT -x {VARIABLE} -stdout-proc {job.name}.%j/%/1000R/out "
        f'-stderr-proc {job.name}.%j/%/1000R/err bash -c "$bind" -- {shlex.join(job.command)}'
    )
    return [
        *lines,
        "# one rank on each CMG (or pair, or all four), with its memory beside it",
        f"bind='exec numactl --cpunodebind={domains} --membind={domains} \"$@\"'",
        *_again(job, mpiexec),
    ]
