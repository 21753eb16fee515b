"""The comparison: one training in peace, the same under faults, and what differs."""

from __future__ import annotations

import itertools
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tozan import data
from tozan.chaos import faults as script
from tozan.chaos.faults import Fault, Marks
from tozan.chaos.outside import Outsider
from tozan.chaos.report import Report
from tozan.checkpoint import folders, manifest
from tozan.config import load
from tozan.errors import Problem, UserError
from tozan.recovery.agent import Agent
from tozan.recovery.elastic import fitting
from tozan.recovery.supervise import policy

STEPS_PER_FAULT = 50
"""One step lost per fault is then 2% of all."""
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
timeout = 30
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


@dataclass(frozen=True)
class Ending:
    """How a run ended.

    Attributes:
        status: what the agent returned.
        seconds: from the first generation to the end.
        events: what the agent told.
        began: when, in ns of the monotonic clock.
    """

    status: int
    seconds: float
    events: list[dict[str, Any]]
    began: int


def chaos(
    out: Path, count: int, seed: int, steps: int | None, flags: Sequence[str], say: Callable[[str], None]
) -> Report:
    """Train twice and compare.

    Args:
        out: folder for everything; made anew.
        count: faults.
        seed: of the script.
        steps: of the training; None: `STEPS_PER_FAULT` for every fault.
        flags: `--table.key=value` that change the training.
        say: is told what happens.

    Raises:
        UserError: the folder holds something else, or a flag is wrong.
    """
    steps = steps or max(60, count * STEPS_PER_FAULT)
    if out.exists() and not (out / "data").is_dir() and any(out.iterdir()):
        raise UserError(Problem(str(out), "holds something else", "name a folder that does not exist yet"))
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    documents = itertools.islice(data.corpus.standard_library(limit=400_000), 200)
    data.build(documents, out / "data", vocabulary=384, validation=0.1)
    config = load(write_config(out, "peace", steps), flags).config
    plan = script.write(seed, count, steps, config.layout.processes, config.checkpoint.every)
    (out / "script.json").write_text(json.dumps([fault.words() for fault in plan], indent=1))
    say(f"{steps:,} steps on {config.layout.processes} ranks, in peace")
    peace = train(out, "peace", steps, flags, [])
    if peace.status:
        raise UserError(Problem(str(out), f"the peaceful run ended with {peace.status}", f"see {out}/peace.log"))
    say(f"  {peace.seconds:.0f} s; now with {count} faults")
    marks = Marks.create(count)
    hurt = train(out, "hurt", steps, flags, plan, marks)
    fired = {fault.number: marks.get(fault.number) for fault in plan}
    report = Report.make(plan, fired, hurt.events, steps, (peace.seconds, hurt.seconds))
    report.differences += compare(out / "peace", out / "hurt", steps, config.train.global_batch or 0)
    if hurt.status:
        report.differences.append(f"the run ended with exit status {hurt.status}, see {out}/hurt.log")
    report.write(out)
    return report


def write_config(out: Path, name: str, steps: int) -> Path:
    """The config of one of the two runs."""
    path = out / f"{name}.toml"
    path.write_text(CONFIG.format(folder=out / name, data=out / "data", steps=steps))
    return path


def train(
    out: Path, name: str, steps: int, flags: Sequence[str], plan: list[Fault], marks: Marks | None = None
) -> Ending:
    """One training under an agent, with the faults of a plan."""
    path = write_config(out, name, steps)
    config = load(path, flags).config
    events: list[dict[str, Any]] = []
    environment = {}
    if marks:
        environment["TOZAN_CHAOS"] = json.dumps({"script": str(out / "script.json"), "marks": marks.descriptor})
    agent = Agent(
        ["train", str(path), *flags],
        partial(fitting, path, flags),
        config.layout.processes,
        policy(config),
        events.append,
        environment,
        (marks.descriptor,) if marks else (),
        out / f"{name}.log",
    )
    outsider = None
    if marks:
        outside = [fault for fault in plan if fault.point == "outside"]
        outsider = Outsider(agent, outside, marks, out / name, out / "data")
        agent.on_event = outsider.told(events.append)
        outsider.start()
    began = time.monotonic_ns()
    try:
        status = agent.run()
    finally:
        if outsider:
            outsider.end()
        agent.close()
    return Ending(status, (time.monotonic_ns() - began) / 1e9, events, began)


def compare(peace: Path, hurt: Path, steps: int, batch: int) -> list[str]:
    """What is not the same about two runs; empty if all is well."""
    found = []
    ends = []
    for folder in (peace, hurt):
        final = folders.path_of(folder / "checkpoints", steps)
        if not (final / manifest.NAME).exists():
            return [f"{final} is not there"]
        ends.append((manifest.read(final).state, json.loads((final / "trainer.json").read_text())["meta"]))
    if ends[0][0] != ends[1][0]:
        found.append("the final weights and optimizer states differ")
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
