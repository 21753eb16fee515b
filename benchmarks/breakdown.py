"""What the breakdown costs, and whether an outside profiler sees the same phases.

    python benchmarks/breakdown.py cost                 seconds of the bookkeeping of a step beside the step
    python benchmarks/breakdown.py agree --seconds 30   phases beside samples of py-spy (pip install py-spy)

`cost` times the very calls that a step makes (marks, a record, a timeline in a hundred) beside the step of a small
model. `agree` trains in a process of its own, which py-spy samples from outside by its stack: no common code.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from tozan import data
from tozan.comm.ledger import Ledger
from tozan.config import load
from tozan.train.breakdown import Breakdown
from tozan.train.clock import Clock
from tozan.train.faults import Interrupted
from tozan.train.loop import fit
from tozan.train.run import assemble

CONFIG = """
version = 1
[run]
folder = "{folder}/run"
[model]
layers = 4
width = 256
heads = 4
sequence = 64
vocabulary = 2048
[data]
path = "{folder}/data"
[train]
steps = {steps}
micro_batch = 1
accumulate = 2
precision = "fp32"
threads = 1
[eval]
every = 0
[checkpoint]
every = 0
"""

CALLS = {
    "own_micro_batches": "data",
    "_wrapped_call_impl": "forward",
    "backward": "backward",
    "gradient_norm": "optimizer",
    "step": "optimizer",
    "zero_grad": "optimizer",
    "publish": "optimizer",
    "judge": "checks",
    "keep": "checks",
}
"""Which phase a function belongs to that `train_step` calls."""


def prepare(folder: Path, steps: int) -> Path:
    """A data set and a config for a model of 4 million parameters."""
    if not (folder / "data").exists():
        documents = (
            document for document, _ in zip(data.corpus.standard_library(limit=3_000_000), range(400), strict=False)
        )
        data.build(documents, folder / "data", vocabulary=2048, validation=0.1)
    path = folder / "run.toml"
    path.write_text(CONFIG.format(folder=folder, steps=steps))
    return path


def cost(folder: Path) -> None:
    """The bookkeeping of one step of two micro-batches with 40 collectives, beside a step."""
    ledger, steps = Ledger(), 2_000
    clock = Clock(ledger=ledger)
    breakdown = Breakdown(folder, 0, ledger, None)
    spent = []
    for step in range(1, steps + 1):
        for _ in range(40):
            ledger.end(ledger.begin("all_reduce", "gradients", "dp", (0, 1), 8, time.perf_counter()))
        begin = time.perf_counter()
        breakdown.begin(step, clock)
        for phase in ("data", "forward", "backward", "forward", "backward", "communication", "optimizer"):
            clock.mark(phase)
        breakdown.end(step, clock)
        breakdown.write(step, *clock.lap())
        spent.append(time.perf_counter() - begin)
    breakdown.close()
    mean = statistics.fmean(spent)
    print(f"bookkeeping: {1e6 * mean:.0f} µs a step (median {1e6 * statistics.median(spent):.0f} µs)")
    print(f"1% of a step of {100 * mean:.4f} s; longer steps lose less")


def train(path: Path) -> None:
    """Train in this process; prints when it begins and its phases at the end."""
    torch.set_num_threads(1)
    run = assemble(load(path))
    print("begin", flush=True)
    with contextlib.suppress(Interrupted):  # the other side has seen enough
        fit(run)


def agree(folder: Path, seconds: float) -> None:
    """Phases by the clock beside py-spy's samples of the same seconds."""
    program = shutil.which("py-spy")
    if program is None:
        raise SystemExit("needs py-spy: pip install py-spy")
    path = prepare(folder, 100_000)
    command = [sys.executable, __file__, "train", "--config", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        while "begin" not in child.stdout.readline():
            pass
        time.sleep(2.0)
        first = len((folder / "run" / "metrics.jsonl").read_text().splitlines())
        record = [program, "record", "--format", "raw", "--rate", "200", "--duration", str(round(seconds))]
        subprocess.run([*record, "--output", str(folder / "raw"), "--pid", str(child.pid)], check=True)
        lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()[first:]
        child.terminate()
    compare([json.loads(line) for line in lines], (folder / "raw").read_text())


def compare(records: list[dict], raw: str) -> None:
    """Print shares by the clock and by the samples, phase by phase."""
    clock: Counter[str] = Counter()
    for record in records:
        clock.update(record.get("phases", {}))
    samples: Counter[str] = Counter()
    for line in raw.splitlines():
        stack, _, number = line.rpartition(" ")
        if "train_step" in stack:
            samples[phase_of(stack.split(";"))] += int(number)
        elif "fit (" in stack:
            samples["other"] += int(number)
    of_clock, of_samples = sum(clock.values()), sum(samples.values())
    print(f"{'phase':14} {'clock':>8} {'py-spy':>8} {'ratio':>6}   {len(records)} steps, {of_samples} samples")
    for phase in sorted(clock, key=lambda name: -clock[name]):
        a, b = clock[phase] / of_clock, samples[phase] / max(1, of_samples)
        print(f"{phase:14} {a:8.2%} {b:8.2%} {a / b if b else float('nan'):6.2f}")


def phase_of(stack: list[str]) -> str:
    """The phase of a sample: what `train_step` has called, by name; its own lines are between the phases."""
    at = next(index for index, frame in enumerate(stack) if frame.startswith("train_step "))
    called = [frame.split(" ")[0].rpartition(".")[2] for frame in stack[at + 1 : at + 4]]
    for name in called[:2]:  # the second where a decorator stands between
        if name in CALLS:
            return CALLS[name]
    return "other"


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("cost", "agree", "train"))
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--config", type=Path)
    options = parser.parse_args()
    if options.what == "train":
        train(options.config)
        return
    with tempfile.TemporaryDirectory() as folder:
        cost(Path(folder)) if options.what == "cost" else agree(Path(folder), options.seconds)


if __name__ == "__main__":
    main()
