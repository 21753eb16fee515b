"""How much longer the step beside a save takes, GPT-2 124M with AdamW (1.49 GB), through the command line.

    python benchmarks/saving.py --saves 4

Saves every second step, once in the background and once in the foreground; the step that follows a save is compared
with the one that does not, in the same run. The first pair is a warm-up (fresh memory) and does not count.
"""

from __future__ import annotations

import argparse
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
micro_batch = 4
global_batch = 4
[optim]
lr = 1e-4
[eval]
every = 0
[checkpoint]
every = 2
keep_last = 1
"""


def seconds(folder: Path, background: bool) -> tuple[list[float], list[float]]:
    """Seconds of the steps beside a save (the call of `save` included), and of the others."""
    flags = [f"--checkpoint.background={str(background).lower()}"]
    records = trained_steps([sys.executable, "-m", "tozan", "train"], folder.parent / "run.toml", folder, flags)
    steps = {record["step"]: record["seconds"] for record in records}
    others = [seconds for step, seconds in steps.items() if not step % 2][1:]
    return [seconds for step, seconds in steps.items() if step % 2 and step > 3], others


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saves", type=int, default=4)
    parser.add_argument("--folder", help="where checkpoints go; default: a temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as base:
        folder = Path(base)
        steps = 2 * options.saves + 3
        (folder / "run.toml").write_text(CONFIG.format(data=standard_text(folder), steps=steps))
        for name, background in (("background", True), ("foreground", False)):
            beside, others = (statistics.median(each) for each in seconds(folder / name, background))
            longer = f"{beside - others:+.2f} s, {beside / others:.2f}×"
            print(f"{name}: {others:.2f} s a step, {beside:.2f} s beside a save: {longer}")


if __name__ == "__main__":
    main()
