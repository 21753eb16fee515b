"""Predicted against measured on this machine: step time, peak memory and bytes of real layouts of up to 8 ranks.

    python benchmarks/plan_measured.py                         calibrates first (2 minutes), then runs every layout
    python benchmarks/plan_measured.py --machine mine.toml     with a machine file of `tozan bench calibrate`
    python benchmarks/plan_measured.py --only gpt2 zero3       those whose name has one of these in it
    python benchmarks/plan_measured.py --memory                two steps each, for memory and bytes only
    python benchmarks/plan_measured.py --folder runs           leaves ledgers and phases of every rank there

Every rank takes the trainer's own steps (the first is a warm-up) and leaves its times, its ledger and its largest
resident set: VmHWM of /proc/self/status, which the kernel keeps for each process, read before anything is saved. The
memory of a layout is that of its fullest rank, its time the median step of rank 0.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tozan import data
from tozan.config import Config, load
from tozan.planner import Prediction, predict

SHAPES = {
    "gpt2-124m": ["--model.preset=gpt2-124m", "--train.global_batch=4", "--train.micro_batch=2", "--train.steps=3"],
    "gpt2-6x384": [
        *("--model.layers=6", "--model.width=384", "--model.heads=6", "--model.sequence=512"),
        *("--train.global_batch=8", "--train.micro_batch=2", "--train.steps=6"),
    ],
    "llama-8x512": [
        *("--model.family=llama", "--model.layers=8", "--model.width=512", "--model.heads=8", "--model.tied=false"),
        *("--model.sequence=256", "--train.global_batch=16", "--train.micro_batch=2", "--train.steps=4"),
    ],
    "gpt2-4x256": [
        *("--model.layers=4", "--model.width=256", "--model.heads=4", "--model.sequence=256"),
        *("--train.global_batch=32", "--train.micro_batch=4", "--train.steps=6"),
    ],
    "gpt2-8x320": [
        *("--model.layers=8", "--model.width=320", "--model.heads=4", "--model.sequence=384"),
        *("--train.global_batch=16", "--train.micro_batch=4", "--train.steps=6"),
    ],
    "llama-6x640": [
        *("--model.family=llama", "--model.layers=6", "--model.width=640", "--model.heads=10", "--model.tied=false"),
        *("--model.sequence=384", "--train.global_batch=8", "--train.micro_batch=2", "--train.steps=4"),
    ],
}
"""Six models, each with its batch."""


CONFIG = """
version = 1
[data]
path = "{data}"
[train]
steps = 1
[optim]
lr = 1e-4
[checks]
outlier = 0  # a step that is computed again would be sent again
"""


def layout(**table: object) -> list[str]:
    """Flags of a layout."""
    return [f"--layout.{key}={str(value).lower()}" for key, value in table.items()]


UNEVEN = '--train.recompute_stages=["full", "none"]'
RUNS = [
    ("gpt2-124m", "one process", []),
    ("gpt2-124m", "dp2", layout(data=2)),
    ("gpt2-124m", "tp2", layout(tensor=2)),
    ("gpt2-6x384", "one process", []),
    ("gpt2-6x384", "dp2 zero1", layout(data=2, zero=1)),
    ("gpt2-6x384", "pp2", layout(pipeline=2)),
    ("gpt2-6x384", "cp2", layout(context=2)),
    ("gpt2-6x384", "tp2 full recompute", [*layout(tensor=2), "--train.recompute=full"]),
    ("llama-8x512", "tp2 seq", layout(tensor=2, sequence_parallel=True)),
    ("llama-8x512", "dp4 zero3", layout(data=4, zero=3)),
    ("llama-8x512", "pp2 zero-bubble", layout(pipeline=2, schedule="zero-bubble")),
    ("llama-8x512", "dp2 tp2", layout(data=2, tensor=2)),
    ("llama-8x512", "pp2 5+3 full+none", [*layout(pipeline=2, split="[5, 3]"), UNEVEN]),
    ("gpt2-4x256", "tp4 2d", layout(tensor=4, scheme="2d")),
    ("gpt2-4x256", "pp4", layout(pipeline=4, schedule="1f1b")),
    ("gpt2-4x256", "dp8", layout(data=8)),
    ("gpt2-4x256", "dp2 tp2 pp2", layout(data=2, tensor=2, pipeline=2)),
    ("gpt2-8x320", "one process", []),
    ("gpt2-8x320", "dp2 zero2", layout(data=2, zero=2)),
    ("gpt2-8x320", "pp2 interleaved", layout(pipeline=2, schedule="interleaved", chunks=2)),
    ("llama-6x640", "tp2", layout(tensor=2)),
    ("llama-6x640", "dp2 pp2", layout(data=2, pipeline=2)),
    ("llama-6x640", "dp2 cp2", layout(data=2, context=2)),
]
"""Model, name and flags of every run. The last two models were chosen when the forecast was finished."""


def take_steps(path: Path, flags: list[str]) -> None:
    """One rank: the run's steps, and what they took."""
    from tozan.comm.launch import join
    from tozan.comm.processor import largest_resident_set
    from tozan.train.clock import Clock
    from tozan.train.faults import StopSignal
    from tozan.train.loop import advance
    from tozan.train.run import assemble
    from tozan.train.split import mesh_layout
    from tozan.train.step import train_step

    loaded = load(path, flags)
    with join(mesh_layout(loaded.config), timeout_s=600) as mesh:
        run = assemble(loaded, mesh)
        mesh.ledger.clear()  # only steps count
        clock, laps = Clock(run.device, mesh.ledger), []
        with StopSignal(mesh) as stop:
            for _ in range(loaded.config.train.steps):
                stop.agreed()
                advance(run, train_step(run, clock))
                laps.append(clock.lap())
        peak = largest_resident_set()
        mesh.ledger.write(run.folder / f"ledger-{mesh.rank}.jsonl", mesh.rank)
        names = sorted({name for _, phases in laps for name in phases})
        result = {
            "seconds": statistics.median(seconds for seconds, _ in laps[1:]),
            "phases": {name: statistics.median(phases.get(name, 0.0) for _, phases in laps[1:]) for name in names},
            "laps": laps,
            "peak": peak,
        }
        (run.folder / f"result-{mesh.rank}.json").write_text(json.dumps(result), encoding="utf-8")


def measure(path: Path, flags: list[str], config: Config) -> tuple[list[dict], bool, Prediction]:
    """What every rank of a run took, and whether each sent what was forecast for it."""
    ranks, folder = config.layout.processes, Path(config.run.folder)
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--log-dir", str(folder / "log")]
    command += [__file__, "--take-steps", str(path), "--flags", json.dumps(flags)]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    results = [json.loads((folder / f"result-{rank}.json").read_text()) for rank in range(ranks)]
    forecast = predict(config, MACHINE[0])
    same = True
    for rank in range(ranks):
        lines = map(json.loads, (folder / f"ledger-{rank}.jsonl").read_text().splitlines())
        found = {(x["axis"], x["operation"], x["name"]): x["bytes"] for x in lines if x["bytes"]}
        same &= found == {key: config.train.steps * sent for key, sent in forecast.traffic(rank).items()}
    return results, same, forecast


MACHINE: list[Path] = []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", type=Path, help="default: calibrate now")
    parser.add_argument("--only", nargs="+", default=[""], help="parts of runs' names")
    parser.add_argument("--memory", action="store_true", help="two steps each: times mean nothing then")
    parser.add_argument("--folder", type=Path, help="where the runs stay; default: nowhere")
    parser.add_argument("--take-steps", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--flags", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.take_steps:
        take_steps(options.take_steps, json.loads(options.flags))
        return
    with tempfile.TemporaryDirectory() as base:
        begin = time.perf_counter()
        compare(options.folder or Path(base), options.machine, options.only, options.memory)
        print(f"took {time.perf_counter() - begin:.0f} s")


def compare(base: Path, machine: Path | None, only: list[str], memory: bool) -> None:
    """Run every layout, and print its line."""
    if machine is None:
        from tozan.bench.calibrate import calibrate

        machine = base / "machine.toml"
        begin = time.perf_counter()
        calibrate(machine)
        print(f"calibrated in {time.perf_counter() - begin:.0f} s", flush=True)
    MACHINE[:] = [machine]
    base.mkdir(parents=True, exist_ok=True)
    if not (base / "data").exists():
        data.build(data.corpus.standard_library(limit=2_000_000), base / "data", vocabulary=4096, validation=0.0)
    path = base / "run.toml"
    path.write_text(CONFIG.format(data=base / "data"))
    print("model        layout               ranks  predicted  measured   error      MB     MB   error  bytes")
    errors, memories, exact = [], [], 0
    chosen = [run for run in RUNS if any(part in f"{run[0]} {run[1]}" for part in only)]
    for model, name, extra in chosen:
        flags = [*SHAPES[model], *extra, f"--run.folder={base / f'{model} {name}'.replace(' ', '-')}"]
        flags += ["--train.steps=2"] if memory else []
        config = load(path, flags).config
        results, same, forecast = measure(path, flags, config)
        seconds, peak = results[0]["seconds"], max(one["peak"] for one in results)
        held = sum(forecast.memory.values())
        errors.append(forecast.seconds / seconds - 1)
        memories.append(held / peak - 1)
        exact += same
        print(
            f"{model:12} {name:20} {config.layout.processes:5d}  {forecast.seconds:8.3f}s {seconds:8.3f}s "
            f"{errors[-1]:+7.1%}  {held / 1e6:6.0f} {peak / 1e6:6.0f} {memories[-1]:+7.1%}  "
            f"{'exact' if same else 'OTHER'}",
            flush=True,
        )
        print(f"    forecast {spelled(forecast.phases)}\n    measured {spelled(results[0]['phases'])}", flush=True)
    print(
        f"{len(chosen)} layouts: step time {summary(errors, 0.10)}; peak memory {summary(memories, 0.05)}; "
        f"bytes exact in {exact}"
    )


def spelled(phases: dict[str, float]) -> str:
    """Phases of a millisecond and more."""
    return " ".join(f"{name} {seconds:.3f}" for name, seconds in phases.items() if seconds >= 0.0005)


def summary(errors: list[float], bar: float) -> str:
    """Mean and worst of errors, and how many are within a bar."""
    worst = max(errors, key=abs)
    within = sum(abs(error) <= bar for error in errors)
    return f"{statistics.fmean(map(abs, errors)):.1%} off (mean), {worst:+.1%} (worst), within {bar:.0%} in {within}"


if __name__ == "__main__":
    main()
