"""The files of many ranks, of measurements and of a plan, made from formulas, so that pages need none to be tested."""

import json
import random
from pathlib import Path

from tozan import schedules
from tozan.bench.result import Peak, Result, Row

STAGES, MICROBATCHES = 4, 8


def add_ranks(run: Path, ranks: int, steps: int, slow: int | None = 37) -> Path:
    """Breakdown and timeline of `ranks` ranks in four pipeline stages; one of them computes 1.4 times as long."""
    noise = random.Random(1)
    layout = {"pipeline": STAGES, "data": ranks // STAGES, "tensor": 1, "schedule": "1f1b", "chunks": 1}
    facts = json.loads((run / "run.json").read_text())
    facts |= {"processes": ranks, "layout": layout, "steps": steps, "global_batch": 8 * ranks}
    (run / "run.json").write_text(json.dumps(facts))
    with (run / "config.toml").open("a") as config:
        config.write(f"\n[layout]\npipeline = {STAGES}\ndata = {ranks // STAGES}\n")
    text = (run / "config.toml").read_text().replace("[train]\n", f"[train]\naccumulate = {MICROBATCHES}\n")
    (run / "config.toml").write_text(text)
    for name in ("breakdown", "timeline"):
        (run / name).mkdir()
    for rank in range(ranks):
        write_breakdown(run, rank, steps, 1.4 if rank == slow else 1.0, noise)
        write_timeline(run, rank, rank * STAGES // ranks, 1.4 if rank == slow else 1.0)
    return run


def write_breakdown(run: Path, rank: int, steps: int, times: float, noise: random.Random) -> None:
    """One line a step: a slow rank's forward takes longer, so that it waits less."""
    lines = []
    for step in range(1, steps + 1):
        shake = noise.uniform(0.97, 1.03)
        forward, backward = 0.16 * times * shake, 0.29 * times * shake
        wait = max(0.004, 0.25 - (times - 1) * 0.45) * shake
        phases = {
            "data": 0.004, "forward": forward, "backward": backward, "communication": 0.012, "wait/dp": 0.35 * wait,
            "wait/pp+tp": 0.002, "bubble": 0.65 * wait, "optimizer": 0.05 * shake, "other": 0.006,
        }  # fmt: skip
        transfer = {"dp": 0.31, "pp": 0.22, "pp+tp": 0.004}
        record = {"step": step, "seconds": sum(phases.values()), "phases": phases, "transfer": transfer}
        lines.append(json.dumps(record))
    (run / "breakdown" / f"rank-{rank:06d}.jsonl").write_text("\n".join(lines) + "\n")


def write_timeline(run: Path, rank: int, stage: int, times: float) -> None:
    """Step 100 in detail: the schedule replayed, with messages that take a while."""
    plan = schedules.create("1f1b", STAGES, MICROBATCHES)
    cost = {"forward": 0.02, "backward": 0.036}
    steps = schedules.replay(plan, lambda _, action: times * cost[action.kind], lambda *_: 0.004)
    begin, end = 0.004, 0.004 + max(step.end for step in steps) + 0.001
    found = {
        "step": 100, "rank": rank, "stage": stage, "at": 1.8e9 + rank * 0.01, "memory": 2_000_000_000,
        "phases": [["data", 0.0, begin], ["other", begin, end], ["optimizer", end, end + 0.05]],
        "collectives": [["recv", "pp", "pipeline forward", 0, 0.01, 0.02, 0.01],
                        ["send", "pp", "pipeline backward", 512, 0.02, 0.02, 0.0],
                        ["reduce_scatter", "dp", "gradients of blocks.0", 4096, end, 0.02, 0.01]],
        "actions": [[*s.action, s.start + begin, s.end + begin] for s in steps if s.stage == stage],
        "pipeline": [begin, end],
    }  # fmt: skip
    (run / "timeline" / f"rank-{rank:06d}.json").write_text(json.dumps(found))


MADE = {
    "created": "2026-11-25T09:00:00+00:00",
    "machine": {"processor": "Example CPU", "cores": 48, "memory_bytes": 32 * 2**30},
    "versions": {"tozan": "0.1.0", "torch": "2.13.0", "python": "3.11.2"},
}


def make_gemm(path: Path) -> Path:
    """Products of a GPT's step in two precisions, with the rate of a machine of 1.2 and 2.4 TFLOP/s and 200 GB/s."""
    peaks = {"fp32": Peak(measured=1.2e12, nominal=1.5e12), "bf16": Peak(measured=2.4e12)}
    sizes = {
        "qkv": (4096, 3072, 1024),
        "projection": (4096, 1024, 1024),
        "fc": (4096, 4096, 1024),
        "head": (4096, 50304, 1024),
    }
    total = sum(2.0 * m * n * k for m, n, k in sizes.values()) * 3
    rows = []
    for precision, item in (("fp32", 4), ("bf16", 2)):
        for name, (m, n, k) in [*sizes.items(), ("scores", (1024, 1024, 64))]:
            batch = 64 if name == "scores" else 1
            for direction in ("forward", "input gradient", "weight gradient"):
                flops, moved = 2.0 * m * n * k * batch, item * batch * (m * k + k * n + m * n)
                rate = 0.8 * min(peaks[precision].measured, flops / moved * 2e11)
                own = {"m": m, "n": n, "k": k, "batch": batch, "precision": precision, "threads": 48, "tensor": 1}
                own |= {"direction": direction, "bytes": moved, "share": flops / total, "flops_per_second": rate}
                label = f"{name} {direction} {precision}"
                rows.append(Row.of(label, "FLOP/s", [0.97 * rate, rate, 1.02 * rate], **own))
    Result(kind="gemm", rows=rows, peaks=peaks, bandwidth=2e11, notes=["operands are random"], **MADE).write(path)
    return path


def make_scaling(path: Path, most: int = 64) -> Path:
    """Strong scaling of the talk's 124M set-up, losing more to the all-reduce the more ranks there are."""
    rows, ranks = [], 1
    while ranks <= most:
        compute, reduce = 640.0 / ranks, 0.0 if ranks == 1 else 0.9 + 0.05 * ranks
        phases = {"forward": compute / 3, "backward": 2 * compute / 3, "wait/dp": reduce, "optimizer": 0.4}
        seconds = sum(phases.values())
        own = {"ranks": ranks, "seconds": seconds, "tokens_per_second": 1024 * 1024 / seconds, "mode": "strong",
               "flops_per_second": 6 * 124e6 * 1024 * 1024 / seconds, "phases": phases, "layout": {"data": ranks},
               "predicted_seconds": seconds * 1.06}  # fmt: skip
        rows.append(Row.of(f"{ranks} ranks", "s", [0.98 * seconds, seconds, 1.03 * seconds], **own))
        ranks *= 2
    peaks = {"fp32": Peak(measured=1.2e12, nominal=6.144e12)}
    Result(kind="scaling", rows=rows, peaks=peaks, options={"precision": "fp32"}, **MADE).write(path)
    return path


def make_collectives(path: Path) -> Path:
    """All-reduce and all-gather over loopback, 1 KiB to 64 MiB: a latency and a bandwidth."""
    rows = []
    for operation, best in (("all_reduce", 1.5e9), ("all_gather", 2.5e9), ("reduce_scatter", 1.9e9)):
        for power in range(10, 27, 2):
            seconds = 60e-6 + 2**power / best
            rate = 2**power / seconds
            own = {
                "operation": operation,
                "bytes": 2**power,
                "ranks": 4,
                "over": "loopback",
                "latency": False,
                "dtype": "fp32",
            }
            rows.append(Row.of(f"{operation} {2**power}", "bytes/s", [0.9 * rate, rate, 1.1 * rate], **own))
    Result(kind="collectives", rows=rows, **MADE).write(path)
    return path


def make_io(path: Path) -> Path:
    """Two readers, cold and warm, and samples through the trainer's own."""
    own = {"p50_seconds": 3e-6, "p99_seconds": 4e-3}
    rows = [
        Row.of(f"{reader}, {state}", "1/s", [0.9 * rate, rate, 1.1 * rate], reader=reader, state=state, **own)
        for reader, rate in (("one file each", 1e5), ("tar shards, index", 6e5))
        for state in ("cold", "warm")
    ]
    rows.append(Row.of("samples of 1,025 tokens, 8 at a time, start", "1/s", [9e3, 1e4], reader="x", state="warm"))
    Result(kind="io", rows=rows, **MADE).write(path)
    return path


def make_doctor(path: Path) -> Path:
    """Products in two precisions, memory, one route, one problem."""
    rows = [
        Row.of(f"matrix product {name} {threads} threads", "FLOP/s", [rate * threads], precision=name, threads=threads)
        for name, rate in (("bf16", 5e10), ("fp32", 2e10))
        for threads in (1, 48)
    ]
    for what in ("new buffer, as started", "new buffer, as tozan sets it", "small pages", "huge pages"):
        rows.append(Row.of(f"{what}: 64 MiB", "s", [0.05, 0.06]))
    peaks = {"bf16": Peak(measured=2.4e12, nominal=3e12, how="48 cores × 32 FLOP a cycle"), "fp32": Peak(measured=1e12)}
    problem = {"name": "load", "what": "busy", "cost": "half the time", "source": "measured here", "fix": "top"}
    backends = {"gloo": {"all_reduce sum": {"fp32": "ok", "bf16": "rounded", "fp8": "no"}}}
    facts = {"backends": backends}
    Result(kind="doctor", rows=rows, peaks=peaks, problems=[problem], facts=facts, **MADE).write(path)
    return path


def make_step(path: Path) -> Path:
    """The phases of a step and what this machine would need for each at least."""
    parts = {"forward": (0.9, 0.6), "backward": (1.8, 1.2), "optimizer": (0.2, 0.15), "data": (0.01, 0.001)}
    rows = [
        Row.of(name, "s", [0.98 * took, took, 1.04 * took], floor_seconds=floor)
        for name, (took, floor) in parts.items()
    ]
    Result(kind="step", rows=rows, **MADE).write(path)
    return path


SHARES = {
    "matrix": 0.52,
    "attention": 0.06,
    "elementwise": 0.08,
    "tensor": 0.09,
    "bubble": 0.11,
    "pipeline": 0.02,
    "data": 0.07,
    "optimizer": 0.03,
    "noise": 0.02,
}
MEMORY = {"parameters": 3.2e9, "gradients": 3.2e9, "optimizer": 6.4e9, "activations": 8e9, "working": 1.1e9}
TORUS = (2, 3, 4, 2, 2)


def planned_layout(number: int, pp: int, dp: int, tp: int) -> dict:
    seconds = 21.0 * 1.08**number
    mesh = {"pp": pp, "dp": dp, "cp": 1, "tp": tp, "grid": 0, "depth": 1}
    return {
        "name": f"pp{pp} dp{dp} tp{tp}, micro-batch 1, ZeRO-1, recompute selective",
        "memory_limit": 3.2e10,
        "flops_per_device": 6.4e11 / 1.08**number,
        "layout": {**mesh, "micro_batch": 1, "chunks": 1, "zero": 1, "recompute": "selective", "offload": "none"},
        "seconds": seconds,
        "low": 0.85 * seconds,
        "high": 1.2 * seconds,
        "days": seconds * 6,
        "breakdown": {name: share * seconds for name, share in SHARES.items()},
        "memory": MEMORY,
        "flops_per_second": 96 * 6.4e11 / 1.08**number,
        "peak_share": 0.104 / 1.08**number,
        "energy": 210.0,
        "cost": 96 * seconds * 6 * 24 * 150,
        "overhead": 0.000123,
        "failure_days": 43.0,
        "checkpoint_seconds": 1.6,
        "checkpoint_minutes": 57.0,
    }


def make_plan(folder: Path) -> Path:
    """A plan of a 13B model on 96 nodes of a small torus."""
    places = []
    for rank in range(96):
        number, place = rank, []
        for length in TORUS:
            place.append(number % length)
            number //= length
        places.append(place)
    curve = [{"nodes": n, "seconds": 21.0 * 96 / n * (1 + n / 900), "flops": 1e12 * n} for n in (6, 12, 24, 48, 96)]
    schedule = schedules.create("1f1b", 4, 12)
    steps = schedules.replay(schedule, lambda _, action: 0.4 if action.kind == "forward" else 0.8)
    actions = [[s.stage, *s.action, s.start, s.end] for s in steps]
    sizes = ((4, 12, 2), (2, 24, 2), (8, 6, 2), (4, 24, 1))
    plan = {
        "format": "tozan plan",
        "version": 1,
        "model": "fugaku-13b",
        "parameters": 13_000_000_000,
        "shape": {"layers": 40, "width": 5120},
        "machine": "Example torus",
        "notes": ["The runner-up loses 1.7 s a step."],
        "nodes": 96,
        "currency": "JPY",
        "price_per_device_hour": 150.0,
        "tokens": 2.6e11,
        "layouts": [planned_layout(number, *size) for number, size in enumerate(sizes)],
        "pipeline": {"schedule": "1f1b", "stages": 4, "microbatches": 12, "chunks": 1, "timeline": actions},
        "torus": {"shape": TORUS, "ranks": places},
        "curves": {"strong": curve, "weak": None},
    }
    folder.mkdir(parents=True)
    (folder / "plan.json").write_text(json.dumps(plan))
    return folder
