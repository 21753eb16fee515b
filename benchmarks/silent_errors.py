"""False alarms and cost of the checks for silent errors: many clean steps of a tiny model, with and without them.

    python benchmarks/silent_errors.py [--steps 10000] [--processes 1]

Prints what `[checks]` said (it should say nothing) and milliseconds per step with `all`, `rotating` and `off`.
With more processes, start it under torchrun:

    torchrun --standalone --nproc-per-node 2 benchmarks/silent_errors.py --processes 2
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
import time
from pathlib import Path

from tozan import data
from tozan.comm import launch
from tozan.config import load
from tozan.train.clock import Clock
from tozan.train.run import assemble
from tozan.train.split import mesh_layout
from tozan.train.step import train_step

CONFIG = """
version = 1
run.folder = "{folder}"
model = {{ layers = 2, width = 32, heads = 4, vocabulary = 384, sequence = 16 }}
data.path = "{data}"
layout.data = {processes}
train = {{ steps = 1000000, micro_batch = 2, precision = "fp32", threads = 1 }}
optim = {{ lr = 1e-3, schedule = "constant", warmup = 100 }}
"""


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    base = Path(tempfile.gettempdir()) / f"tozan-silent-{os.environ.get('TORCHELASTIC_RUN_ID', os.getpid())}"
    rank = int(os.environ.get("RANK", "0"))
    folder = base / f"data-{rank}"
    data.build(itertools.islice(data.corpus.standard_library(limit=400_000), 200), folder, vocabulary=384)
    path = base / f"run-{rank}.toml"
    path.write_text(CONFIG.format(folder=base / f"run-{rank}", data=folder, processes=options.processes))
    with launch.join(mesh_layout(load(path).config), threads=1) as mesh:
        for kind, steps in (("all", options.steps), ("rotating", options.steps // 10), ("off", options.steps // 10)):
            run = assemble(load(path, [f"--checks.memory={kind}", "--checks.slow=0"]), mesh)
            said: list[tuple[str, str]] = []
            begin, looked = time.perf_counter(), 0
            for _ in range(steps):
                while train_step(run, Clock()).again:
                    looked += 1
                said += [(event, text) for event, text in run.checks.take_events() if event != "odd step"]
                run.step += 1
                run.samples += run.global_batch
            if rank == 0:
                each = (time.perf_counter() - begin) / steps * 1e3
                print(f"memory = {kind}: {steps:,} clean steps, {len(said)} alarms, {each:.2f} ms per step", *said)
                print(f"    {looked} steps looked odd, were computed again, and came out the same")


if __name__ == "__main__":
    main()
