"""What a save costs the steps beside it, GPT-2 124M with AdamW (1.49 GB), through the command line.

    python benchmarks/saving.py --saves 4

Saves every few steps, in the background, in the foreground, and in the background with a core that training leaves
free. In each period between two saves the last two steps are those that nothing is written beside (where a write takes
less than a period); what the others take beyond them is the cost of the save, and so is the call of `save`. The first
period is a warm-up (fresh memory) and does not count.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path

from common import standard_text, trained_steps

CONFIG = """
version = 1
[model]
preset = "gpt2-124m"
[data]
path = "{data}"
[train]
steps = {steps}
micro_batch = {micro_batch}
accumulate = 1
[optim]
lr = 1e-4
[eval]
every = 0
[checkpoint]
every = {every}
keep_last = 1
"""
QUIET = 2
"""Steps at the end of a period."""
SIDES = {
    "background": (),
    "foreground": ("--checkpoint.background=false",),
    "background, a core free": (f"--train.threads={max(1, len(os.sched_getaffinity(0)) - 1)}",),
}


def seconds(folder: Path, flags: tuple[str, ...], every: int) -> list[list[float]]:
    """Seconds of the steps of each period that begins with a save; a save's call belongs to the step after it."""
    command = [sys.executable, "-m", "tozan", "train"]
    steps = [record["seconds"] for record in trained_steps(command, folder.parent / "run.toml", folder, flags)]
    return [steps[at : at + every] for at in range(every, len(steps) - every + 1, every)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saves", type=int, default=4)
    parser.add_argument("--every", type=int, default=6, help="steps of a period")
    parser.add_argument("--micro-batch", type=int, default=1)
    parser.add_argument("--sides", nargs="+", choices=[*SIDES], default=[*SIDES])
    parser.add_argument("--folder", help="where checkpoints go; default: a temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as base:
        folder = Path(base)
        found = standard_text(folder)
        steps = (options.saves + 2) * options.every
        text = CONFIG.format(data=found, steps=steps, every=options.every, micro_batch=options.micro_batch)
        (folder / "run.toml").write_text(text)
        for name in options.sides:
            periods = seconds(folder / name.replace(" ", "-"), SIDES[name], options.every)[1:]
            usual = statistics.median(step for period in periods for step in period[-QUIET:])
            costs = [sum(period) - usual * len(period) for period in periods]
            first, second = (statistics.median(period[at] for period in periods) for at in (0, 1))
            print(
                f"{name}: {usual:.2f} s a step; a save costs {statistics.median(costs):.2f} s "
                f"({min(costs):.2f} to {max(costs):.2f}); the steps after it take {first:.2f} and {second:.2f} s"
            )


if __name__ == "__main__":
    main()
