"""What a rank takes of memory beside its tensors: libraries, Python's objects, buffers of theirs.

Measured as a run would: fresh processes, started by torchrun, take real steps of a small model.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import psutil

from tozan import data, files
from tozan.bench import step
from tozan.comm.launch import join
from tozan.comm.processor import largest_resident_set
from tozan.config import load
from tozan.ops import native
from tozan.train import assemble
from tozan.train.split import mesh_layout

SMALL = (
    *("--version=1", "--train.steps=2", "--train.micro_batch=2", "--train.accumulate=2"),
    *("--model.layers=4", "--model.width=256", "--model.heads=4", "--model.sequence=256", "--model.vocabulary=4096"),
)
"""Small enough for seconds, and with every operation of a step."""


def measure(ranks: int) -> tuple[float, float]:
    """Bytes of a rank beside its tensors, and what PyTorch's compiler adds, which its recomputation imports.

    That is the largest resident set of the fullest of `ranks` processes, less what its tensors ever took.
    Without an arena for tensors (`ops.native`), the few that there are count, too.

    Raises:
        subprocess.CalledProcessError: a rank failed.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    with files.scratch("tozan-bench-") as folder:
        data.build(data.corpus.standard_library(limit=200_000), folder / "data", vocabulary=1024, validation=0.0)
        command = [sys.executable, *launcher, "-m", "tozan.bench.footprint", str(ranks), str(folder)]
        subprocess.run(command, check=True, capture_output=True)
        found = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
        return max(beside for beside, _ in found), max(compiler for _, compiler in found)


def main(ranks: int, folder: Path) -> None:
    """Be one of the ranks."""
    places = f"--data.path={folder / 'data'}", f"--run.folder={folder / 'run'}"
    loaded = load(None, [*SMALL, *places, f"--layout.data={ranks}"])
    with join(mesh_layout(loaded.config)) as mesh:
        run = assemble(loaded, mesh)
        for _ in range(loaded.config.train.steps):
            step.lap(run)
        tensors = native.arena_bytes()
        beside = largest_resident_set() - (tensors[2] if tensors else 0)
        without = psutil.Process().memory_info().rss
        importlib.import_module("torch._dynamo")
        compiler = psutil.Process().memory_info().rss - without
        (folder / f"{mesh.rank}.json").write_text(json.dumps([beside, compiler]), encoding="utf-8")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
