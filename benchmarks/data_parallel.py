"""Tokens/s of two processes of one thread against one process of two threads, GPT-2 124M, through the command line.

    python benchmarks/data_parallel.py --rounds 2 --steps 3

Both train the same run (global batch 8, bf16) and alternate; the first step of each is a warm-up and does not count.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

from common import standard_text, trained_steps

TRAIN = ["-m", "tozan", "train"]
SIDES = {
    "1 process × 2 threads": ([sys.executable, *TRAIN], ["--train.threads=2"]),
    "2 processes × 1 thread": (
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", *TRAIN],
        ["--layout.data=2"],
    ),
}
CONFIG = """
version = 1
[model]
preset = "gpt2-124m"
[data]
path = "{data}"
[train]
steps = {steps}
micro_batch = 4
global_batch = 8
[optim]
lr = 1e-4
"""


def rates(folder: Path, command: list[str], flags: list[str]) -> list[float]:
    """Tokens/s of every step but the first."""
    records = trained_steps(command, folder.parent / "run.toml", folder, flags)
    return [record["tokens_per_second"] for record in records if record["step"] > 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--flags", nargs="*", default=[], help="for both sides, such as --layout.zero=1")
    options = parser.parse_args()
    found: dict[str, list[float]] = {name: [] for name in SIDES}
    with tempfile.TemporaryDirectory() as base:
        folder = Path(base)
        (folder / "run.toml").write_text(CONFIG.format(data=standard_text(folder), steps=options.steps))
        for number in range(options.rounds):
            for side, (command, flags) in enumerate(SIDES.values()):
                name = list(SIDES)[side]
                found[name] += rates(folder / f"run-{number}-{side}", command, [*flags, *options.flags])
    medians = {name: statistics.median(values) for name, values in found.items()}
    best = medians["1 process × 2 threads"]
    for name, rate in medians.items():
        print(f"{name:24} {rate:8.0f} tokens/s  {rate / best:6.1%}  of {len(found[name])} steps")


if __name__ == "__main__":
    main()
