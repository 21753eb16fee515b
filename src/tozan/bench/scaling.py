"""Strong and weak scaling: real `tozan train` jobs of growing size, read from what they wrote down themselves.

Strong: the same global batch for every number of ranks. Weak: the global batch grows with them. Efficiency is the
tokens/s of a job over those of the smallest one, per rank.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

from tozan import data, files
from tozan.amounts import many, percent, scaled
from tozan.bench import measure
from tozan.bench.result import Peak, Result, Row
from tozan.bench.show import foot, head, table
from tozan.comm import processor
from tozan.config import load
from tozan.errors import Problem, UserError
from tozan.models.arithmetic import Shape, model_flops
from tozan.planner import predict
from tozan.train.run import FLOPS_FORMULA


@dataclass(frozen=True)
class Setup:
    """A family of jobs.

    Attributes:
        model: a preset.
        ranks: numbers of processes.
        mode: `strong` or `weak`.
        axis: key of `[layout]` that grows: `data` or `tensor`.
        micro_batch: samples in one forward pass.
        global_batch: samples of a step; in weak scaling over the data axis, those of one rank.
        precision: compute type.
    """

    model: str
    ranks: tuple[int, ...]
    mode: Literal["strong", "weak"] = "strong"
    axis: Literal["data", "tensor"] = "data"
    micro_batch: int = 1
    global_batch: int = 8
    precision: str = "bf16"

    def batch(self, ranks: int) -> int:
        """Samples of a step on so many ranks."""
        return self.global_batch * (ranks if self.mode == "weak" and self.axis == "data" else 1)


SETUPS = {
    # The talk: 124M, data parallel, a global batch of 1,024 cut into 1024 / ranks micro-batches of one sample each.
    "talk-124m": Setup("gpt2-124m", (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024), "strong", "data", 1, 1024),
    "talk-124m-weak": Setup("gpt2-124m", (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024), "weak", "data", 1, 1),
    # The talk: 1.3B, model parallel over 1, 2, 4 and 8 ranks.
    "talk-1.3b": Setup("gpt2-1.3b", (1, 2, 4, 8), "strong", "tensor", 1, 8),
}


def setup(name: str | None, changes: Mapping[str, Any]) -> Setup:
    """A set-up by name, or 124M on 1 and 2 ranks, with some of its values replaced.

    Raises:
        UserError: no such set-up.
    """
    if name is not None and name not in SETUPS:
        raise UserError(Problem("--setup", f"there is no {name!r}", f"one of {', '.join(SETUPS)}"))
    return replace(SETUPS[name] if name else Setup("gpt2-124m", (1, 2)), **changes)


@dataclass(frozen=True)
class Jobs:
    """How the jobs of a set-up are run.

    Attributes:
        steps: of each job; the first is a warm-up and does not count.
        threads: computing threads of a rank; 0: its share of the cores.
        machine: a machine's name or file, for the planner's prediction; None: none is made.
        flags: further `--table.key value` for `tozan train`.
        data: a data set; None makes one from the standard library.
        launcher: command put before `tozan train`, with `{ranks}` in it; None: torchrun on this machine.
    """

    steps: int = 5
    threads: int = 0
    machine: str | None = None
    flags: tuple[str, ...] = ()
    data: Path | None = None
    launcher: tuple[str, ...] | None = None


def run(setup: Setup, jobs: Jobs) -> Result:
    """Run every job of a set-up, one after the other.

    Raises:
        UserError: a job's config has mistakes, or a job failed; the end of its output is said.
    """
    with files.scratch("tozan-scaling-") as folder:
        texts = jobs.data or _make_data(folder / "data")
        flags = {ranks: _flags(setup, jobs, ranks, texts, folder / f"run-{ranks}") for ranks in setup.ranks}
        for given in flags.values():  # all mistakes before the first job
            load(None, given)
        rows = [_row(setup, jobs, ranks, given, folder / f"run-{ranks}") for ranks, given in flags.items()]
    rows = list(_efficiencies(rows))
    options = {**vars(setup), **vars(jobs), "data": str(jobs.data) if jobs.data else "standard library"}
    peaks = {setup.precision: Peak(**min(rows, key=lambda row: int(row["ranks"]))["peak"])}
    return measure.made("scaling", rows, options, peaks=peaks, notes=list(_notes(setup)))


def _make_data(folder: Path) -> Path:
    data.build(data.corpus.standard_library(limit=4_000_000), folder, vocabulary=4096)
    return folder


def _flags(setup: Setup, jobs: Jobs, ranks: int, texts: Path, folder: Path) -> list[str]:
    replicas = ranks if setup.axis == "data" else 1
    batch = setup.batch(ranks)
    if batch % (replicas * setup.micro_batch):
        what = f"{batch} samples do not divide into {replicas} replicas × micro-batches of {setup.micro_batch}"
        raise UserError(Problem("--global-batch", what, f"use a multiple of {replicas * setup.micro_batch}"))
    return [
        f"--model.preset={setup.model}",
        f"--data.path={texts}",
        f"--run.folder={folder}",
        f"--layout.{setup.axis}={ranks}",
        f"--train.steps={jobs.steps}",
        f"--train.micro_batch={setup.micro_batch}",
        f"--train.global_batch={batch}",
        f"--train.precision={setup.precision}",
        f"--train.threads={jobs.threads}",
        "--eval.samples=1",
        *jobs.flags,
    ]


def _row(setup: Setup, jobs: Jobs, ranks: int, flags: Sequence[str], folder: Path) -> Row:
    config = folder.with_suffix(".toml")
    config.write_text(load(None, flags).toml(), encoding="utf-8")
    train = [sys.executable, "-m", "tozan", "train", str(config)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [*torchrun, *train[1:]] if ranks > 1 else train
    if jobs.launcher:
        command = [*(word.format(ranks=ranks) for word in jobs.launcher), *train]
    environment = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        end = " | ".join((done.stderr or done.stdout).strip().splitlines()[-4:])
        raise UserError(Problem(many(ranks, "rank"), f"the job ended with {done.returncode}: {end}"))
    records = _records(folder)
    facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    sizes = Shape(**facts["shape"])
    tokens = setup.batch(ranks) * sizes.sequence
    took = [record["seconds"] for record in records]
    rate = tokens / median(took)
    names = {name for record in records for name in record["phases"]}
    return Row.of(
        f"{setup.mode} {many(ranks, 'rank')}",
        "s",
        took,
        ranks=ranks,
        seconds=median(took),
        tokens_per_second=rate,
        flops_per_second=rate * model_flops(sizes) / sizes.sequence,
        peak=_peak_of_a_rank(facts),
        phases={name: median(record["phases"].get(name, 0.0) for record in records) for name in sorted(names)},
        layout=facts["layout"],
        predicted_seconds=predict(load(config).config, jobs.machine).seconds if jobs.machine else None,
        mode=setup.mode,
        global_batch=setup.batch(ranks),
    )


def _peak_of_a_rank(facts: Mapping[str, Any]) -> dict[str, Any]:
    """A rank's `Peak` as its job found it: with more ranks on a machine, a rank has fewer cores."""
    ranks, nominal = facts["processes"], facts["peak_nominal_flops"]
    each = {"measured": facts["peak_measured_flops"] / ranks, "nominal": nominal and nominal / ranks}
    return {**each, "how": facts["peak_nominal_how"]}


def _records(folder: Path) -> list[dict[str, Any]]:
    """The records of a run's steps but the first, which warms up."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [record for record in map(json.loads, lines) if record["kind"] == "step"]
    return steps[1:] or steps


def _efficiencies(rows: Sequence[Row]) -> Iterator[Row]:
    first = min(rows, key=lambda row: int(row["ranks"]))
    for row in rows:
        ideal = first["tokens_per_second"] / first["ranks"] * row["ranks"]
        yield row.model_copy(update={"efficiency": row["tokens_per_second"] / ideal})


def _notes(setup: Setup) -> Iterator[str]:
    yield f"FLOP/s = {FLOPS_FORMULA}"
    yield "efficiency = tokens/s per rank over those of the smallest job; the first step does not count"
    cores = processor.cores()
    if max(setup.ranks) > cores:
        yield f"{max(setup.ranks)} ranks share {many(cores, 'core')} here: the curve shows overheads, not scaling"


def page(result: Result) -> list[object]:
    """What `tozan bench scaling` prints."""
    lines = []
    for row in result.rows:
        largest = sorted(row["phases"].items(), key=lambda phase: -phase[1])[:3]
        predicted = row["predicted_seconds"]
        lines.append(
            (
                str(row["ranks"]),
                scaled(row.median, "s"),
                scaled(predicted, "s") if predicted else "—",
                f"{row['tokens_per_second']:,.0f}",
                scaled(row["flops_per_second"], "FLOP/s"),
                percent(row["efficiency"]),
                ", ".join(f"{name} {percent(seconds / row.median)}" for name, seconds in largest),
            )
        )
    headings = ("ranks", "step", "predicted", "tokens/s", "FLOP/s", "efficiency", "largest phases")
    return [head(result), table(headings, lines, wrap=len(headings) - 1), foot(result)]
