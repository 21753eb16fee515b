"""The comparison: one training in peace, the same under faults, and what differs."""

from __future__ import annotations

import itertools
import json
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tozan import data
from tozan.amounts import many
from tozan.chaos import faults as script
from tozan.chaos import hosts as several_hosts
from tozan.chaos.disk import Disk, mounted
from tozan.chaos.faults import Fault, Marks
from tozan.chaos.network import Network
from tozan.chaos.outside import Outsider, Target
from tozan.chaos.report import Report
from tozan.checkpoint import folders, manifest
from tozan.config import load
from tozan.errors import Problem, UserError
from tozan.recovery.agent import Agent
from tozan.recovery.elastic import fitting
from tozan.recovery.supervise import policy

STEPS_PER_FAULT = 50
"""One step lost per fault is then 2% of all."""
STEPS_PER_HOST_FAULT = 150
"""Enough for the run to go on where the network is away for a while."""
DISKS = {
    True: "disks: checkpoints lay on a tmpfs that was full, remounted read-only and unmounted; EIO was injected",
    False: "disks: ENOSPC, EIO and EROFS were injected",
}
CONFIG = """version = 1
[run]
folder = "{folder}"
[model]
family = "gpt2"
layers = 2
width = 32
heads = 2
sequence = 32
dropout = 0.1
[data]
path = "{data}"
[layout]
data = 2
timeout = 10
start_timeout = 10
[train]
steps = {steps}
global_batch = 4
micro_batch = 1
precision = "fp32"
threads = 1
[optim]
lr = 3e-3
warmup = 20
[eval]
samples = 4
[checkpoint]
every = 10
keep_last = 4
[recovery]
stopped = 0.25
"""
HOSTS_CONFIG = "wait = 60\nneighbour = 4\n"


@dataclass(frozen=True)
class Task:
    """What is trained twice.

    Attributes:
        out: folder for everything.
        flags: `--table.key=value` that change the training.
        network: the hosts that it runs on; None: this machine.
    """

    out: Path
    flags: Sequence[str]
    network: Network | None

    def write_config(self, name: str, steps: int) -> Path:
        """The config of one of the two runs."""
        path = self.out / f"{name}.toml"
        text = CONFIG.format(folder=self.out / name, data=self.out / "data", steps=steps)
        path.write_text(text + (HOSTS_CONFIG if self.network else ""))
        return path


def chaos(
    out: Path, count: int, seed: int, steps: int | None, hosts: int, flags: Sequence[str], say: Callable[[str], None]
) -> Report:
    """Train twice and compare.

    Args:
        out: folder for everything; made anew.
        count: faults.
        seed: of the script.
        steps: of the training; None: `STEPS_PER_FAULT` for every fault, with hosts `STEPS_PER_HOST_FAULT`.
        hosts: network namespaces to train on; 1: this machine.
        flags: `--table.key=value` that change the training.
        say: is told what happens.

    Raises:
        UserError: the folder holds something else, a flag is wrong, or hosts cannot be had.
    """
    steps = steps or max(60, count * (STEPS_PER_FAULT if hosts == 1 else STEPS_PER_HOST_FAULT))
    if hosts > 1 and not several_hosts.available():
        problem = "network namespaces cannot be made here"
        raise UserError(Problem("--hosts", problem, "be root and install iproute2, or leave it out"))
    if out.exists() and not (out / "data").is_dir() and any(out.iterdir()):
        raise UserError(Problem(str(out), "holds something else", "name a folder that does not exist yet"))
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    documents = itertools.islice(data.corpus.standard_library(limit=400_000), 200)
    data.build(documents, out / "data", vocabulary=384, validation=0.1)
    with several_hosts.several(hosts) if hosts > 1 else nullcontext() as made:
        return _train_twice(Task(out, flags, Network(made) if made else None), count, seed, steps, say)


def _train_twice(task: Task, count: int, seed: int, steps: int, say: Callable[[str], None]) -> Report:
    out, network = task.out, task.network
    config = load(task.write_config("peace", steps), task.flags).config
    ranks = config.layout.processes
    say(f"{steps:,} steps on {many(ranks, 'rank')}{f' and {len(network.hosts)} hosts' if network else ''}, in peace")
    with _disk(task, "peace"):
        status, peace, _ = train(task, "peace", steps, ranks)
    if status:
        raise UserError(Problem(str(out), f"the peaceful run ended with {status}", f"see {out}/peace.log"))
    say(f"  {peace:.0f} s; now with {many(count, 'fault')}")
    with _disk(task, "hurt") as disk:
        kinds = network.kinds() if network else script.KINDS
        plan = script.write(seed, count, steps, ranks, config.checkpoint.every, kinds, disk is not None)
        (out / "script.json").write_text(json.dumps([fault.words() for fault in plan], indent=1))
        marks = Marks(out / "marks", count)
        status, hurt, events = train(task, "hurt", steps, ranks, plan, marks, disk)
    fired = {fault.number: marks.get(fault.number) for fault in plan}
    marks.close()
    report = Report.make(plan, fired, events, steps, (peace, hurt))
    report.differences += compare(out / "peace", out / "hurt", steps, config.train.global_batch or 0, network is None)
    if status:
        report.differences.append(f"the run ended with exit status {status}, see {out}/hurt.log")
    missing = script.NETWORK.keys() - kinds.keys() if network else set()
    report.notes += [f"{kind}: not tried, since this kernel resets no connections" for kind in sorted(missing)]
    report.notes.append(DISKS[disk is not None])
    report.write(out)
    return report


def _disk(task: Task, name: str) -> AbstractContextManager[Disk | None]:
    """The disk of a run's checkpoints; hosts would each see another one."""
    return nullcontext() if task.network else mounted(task.out / name / "checkpoints")


def train(
    task: Task,
    name: str,
    steps: int,
    ranks: int,
    plan: Sequence[Fault] = (),
    marks: Marks | None = None,
    disk: Disk | None = None,
) -> tuple[int, float, list[dict[str, Any]]]:
    """One training under agents, with the faults of a plan.

    Returns:
        Exit status, seconds, and what the agent told.
    """
    path, folder, log = task.write_config(name, steps), task.out / name, task.out / f"{name}.log"
    environment = {}
    if marks:
        environment["TOZAN_CHAOS"] = json.dumps({"script": str(task.out / "script.json"), "marks": str(marks.path)})
    events: list[dict[str, Any]] = []
    told: Callable[[], list[dict[str, Any]]] = events.copy
    forget: Callable[[], None] | None = None
    if task.network:
        run = partial(task.network.train, [str(path), *task.flags], log, environment)
        told = partial(read_events, folder / "recovery.jsonl")
    else:
        words = ["train", str(path), *task.flags]
        shape, rules = partial(fitting, path, task.flags), policy(load(path, task.flags).config)
        agent = Agent(words, shape, ranks, rules, events.append, environment, log)
        run, forget = partial(_run_to_the_end, agent), agent.forget_copies
    outsider = None
    if marks:
        target = Target(folder, task.out / "data", ranks, told, forget, disk, task.network)
        outsider = Outsider(target, [fault for fault in plan if fault.point == "outside"], marks)
        outsider.start()
    began = time.monotonic()
    try:
        status = run()
    finally:
        if outsider:
            outsider.end()
    return status, time.monotonic() - began, told()


def _run_to_the_end(agent: Agent) -> int:
    try:
        return agent.run()
    finally:
        agent.close()


def read_events(path: Path) -> list[dict[str, Any]]:
    """What an agent's log says so far."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def compare(peace: Path, hurt: Path, steps: int, batch: int, one_layout: bool = True) -> list[str]:
    """What is not the same about two runs; empty if all is well.

    Args:
        peace: folder of one run.
        hurt: folder of the other.
        steps: of both.
        batch: samples in a step.
        one_layout: both kept their layout. Otherwise the state of a process's random generator is left out, which
            depends on which micro-batches were its own; what was drawn from it shows in every step's record.
    """
    found = []
    ends = []
    for folder in (peace, hurt):
        final = folders.path_of(folder / "checkpoints", steps)
        if not (final / manifest.NAME).exists():
            return [f"{final} is not there"]
        sums = {name: entry.sum for name, entry in manifest.read(final).tensors.items()}
        if not one_layout:
            del sums["rng/cpu"]
        ends.append((sums, json.loads((final / "trainer.json").read_text())["meta"]))
    if ends[0][0] != ends[1][0]:
        names = sorted(name for name in ends[0][0] | ends[1][0] if ends[0][0].get(name) != ends[1][0].get(name))
        found.append(f"the final weights and optimizer states differ: {', '.join(names)}")
    if ends[0][1] != ends[1][1]:
        found.append(f"the final counters differ: {ends}")
    if ends[1][1]["samples"] != steps * batch:
        found.append(f"{ends[1][1]['samples']} samples were used, not {steps * batch}")
    records = [last_records(folder) for folder in (peace, hurt)]
    for step in range(1, steps + 1):
        here, there = (run.get(step) for run in records)
        if here is None or there is None:
            found.append(f"step {step} has no record")
        elif any(here[key] != there[key] for key in ("loss", "grad_norm", "lr", "tokens", "samples", "skipped")):
            found.append(f"step {step} differs: {here} {there}")
        elif there["samples"] != step * batch:
            found.append(f"step {step} ends with sample {there['samples']}, not {step * batch}")
    return found


def last_records(folder: Path) -> dict[int, dict[str, Any]]:
    """The last record of every step: that of the attempt that counted."""
    records = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # torn by a kill
        if record["kind"] == "step":
            records[record["step"]] = record
    return records
