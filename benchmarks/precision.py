"""Whether half precision ends where fp32 does: the loss after so many steps in fp32, bf16 and fp16, by seed.

    python benchmarks/precision.py                        # 200 steps, 4 seeds, a model of 0.4 million parameters

Every precision trains the same seeds on the same batches. Noise is what another seed changes in fp32 (standard
deviation); the difference is that to fp32 with the same seed. Losses are means of the last 20 steps.

Beside them stands fp32 whose first weights are nudged by at most fp16's rounding (2⁻¹¹ of their size): what that alone
changes is no fault of a precision.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import torch
from common import standard_text

from tozan.config import load
from tozan.train import assemble
from tozan.train.clock import Clock
from tozan.train.step import train_step

LAST = 20
NUDGE = 2.0**-11
OTHERS = ("fp32 nudged", "bf16", "fp16")


def losses(folder: Path, precision: str, seed: int, options: argparse.Namespace) -> list[float]:
    """The loss of every step of a run, as `tozan train` takes them."""
    flags = {
        "version": 1,
        "run.folder": folder / f"{precision}-{seed}",
        "data.path": folder / "data",
        "model.family": options.family,
        "model.layers": 3,
        "model.width": 96,
        "model.heads": 3,
        "model.sequence": 64,
        "train.steps": options.steps,
        "train.micro_batch": 4,
        "train.accumulate": 2,
        "train.precision": precision.removesuffix(" nudged"),
        "train.seed": seed,
        "train.threads": options.threads,
        "optim.lr": options.lr,
        "optim.warmup": 20,
    }
    run = assemble(load(None, [f"--{name}={value}" for name, value in flags.items()]))
    if precision.endswith("nudged"):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in run.split.model.parameters():
                weight.mul_(1 + NUDGE * (2 * torch.rand(weight.shape, generator=generator) - 1))
    found = []
    for _ in range(options.steps):
        while (result := train_step(run, Clock())).again:
            pass  # it looked odd, and nothing was updated
        found.append(result.loss)
        run.step, run.samples = run.step + 1, run.samples + run.global_batch
    return found


def main() -> None:
    """Train, and print the differences beside the noise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--family", choices=["gpt2", "llama"], default="gpt2")
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    ends: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        standard_text(folder, 1_000_000, 1024)
        for precision in ("fp32", *OTHERS):
            curves = [
                losses(folder, precision, seed, options) for seed in range(options.first, options.first + options.seeds)
            ]
            ends[precision] = [statistics.fmean(curve[-LAST:]) for curve in curves]
            start = statistics.fmean(curve[0] for curve in curves)
            print(f"{precision}: {start:.3f} to {' '.join(f'{end:.4f}' for end in ends[precision])}", flush=True)
    if options.seeds < 2:
        return
    noise = statistics.stdev(ends["fp32"])
    print(f"noise between seeds in fp32: {noise:.4f}")
    for precision in OTHERS:
        apart = statistics.fmean(a - b for a, b in zip(ends[precision], ends["fp32"], strict=True))
        print(f"{precision} against fp32 with the same seed: {apart:+.4f}, {abs(apart) / noise:.2f} of the noise")


if __name__ == "__main__":
    main()
