"""Tokens/s of tozan's training step beside peers' loops over the same shape, step by step in turn.

    python benchmarks/single_node.py                              # GPT-2 124M in bf16, all peers of this environment
    python benchmarks/single_node.py --preset gpt2-350m --micro-batch 1 --sides pytorch pytorch+tcmalloc
    python benchmarks/single_node.py --litgpt ~/litgpt/bin/python --sides litgpt+tcmalloc --out litgpt.json

Each side is a process of its own, with its own allocator and its own compiler, and steps only when told to; one takes
its turn while the others sleep (the CPU time that they use meanwhile is measured, too). tozan stays; peers come in
groups of `--at-once`, as many as fit into memory, and each is compared with the steps that tozan took in its group. The
order turns round with every round; the first rounds, in which compilers work and memory is new, do not count.

A peer's name says how it is set up: `transformers` is what a newcomer starts, `+tcmalloc` preloads that allocator
(Debian: libtcmalloc-minimal4), `+huge` asks PyTorch for huge pages, `+compiled` is torch.compile. `tozan+compiled`,
`tozan+eager` and `tozan+plain` (no kernels of its own) are sides, too. With `--device cuda` all compute on one GPU;
tozan repeats a step there to the bit unless it is `+free`, as peers are. litgpt needs other packages: `--litgpt` names
the interpreter of an environment that has it. The table's MFU is model FLOPs over the best rate of a product measured
by tozan in the run.
"""

from __future__ import annotations

import argparse
import ctypes.util
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from common import standard_text

from tozan.config import Loaded, load
from tozan.cpuinfo import cores
from tozan.models.arithmetic import model_flops
from tozan.train import machine
from tozan.train.run import open_data, shape_of

SETTINGS = ("compiled", "tcmalloc", "huge", "plain", "eager", "free")
SIDES = [
    *("pytorch", "pytorch+tcmalloc", "pytorch+compiled+tcmalloc", "pytorch+compiled+tcmalloc+huge"),
    *("transformers", "transformers+tcmalloc", "transformers+compiled+tcmalloc"),
]
HEAD = (
    f"{'':34}{'tokens/s':>9}{'from':>7}{'to':>7}{'tozan/it':>10}{'from':>6}{'to':>6}{'MFU':>7}{'memory':>10}{'idle':>8}"
)


@dataclass
class Side:
    """A process that trains, and what is known of it."""

    name: str
    process: subprocess.Popen[str]
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    idle: float = 0.0
    """CPU seconds used while others had their turn."""
    peak_flops: float | None = None
    tokens: int = 0
    gpu_memory: int = 0

    def answer(self) -> dict[str, Any]:
        """The next line that the process says.

        Raises:
            SystemExit: it has ended instead.
        """
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):  # libraries may print, too
                return dict(json.loads(line))
        raise SystemExit(f"{self.name} has ended with status {self.process.wait()}")

    def ready(self) -> None:
        """Wait until it is."""
        self.peak_flops = self.answer()["peak_flops"]

    def ask(self) -> None:
        """Have it take one step."""
        assert self.process.stdin is not None
        print(file=self.process.stdin, flush=True)

    def take(self, counts: bool) -> None:
        """What it says of the step."""
        found = self.answer()
        self.tokens, self.gpu_memory = found["tokens"], found.get("gpu_memory", 0)
        self.losses.append(found["loss"])
        if counts:
            self.seconds.append(found["seconds"])

    def cpu_seconds(self) -> float:
        """CPU time of the process so far."""
        user, system = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def peak_memory(self) -> int:
        """Bytes of the largest resident set so far, or of a GPU's memory held at most by tensors."""
        return self.gpu_memory or 1024 * int(
            Path(f"/proc/{self.process.pid}/status").read_text().split("VmHWM:")[1].split()[0]
        )

    def end(self) -> None:
        """Let the process end."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def configured(folder: Path, options: argparse.Namespace, settings: list[str]) -> list[str]:
    """The flags of tozan's side."""
    return [
        "--version=1",
        f"--model.preset={options.preset}",
        f"--data.path={folder / 'data'}",
        f"--run.folder={folder / 'run'}",
        "--train.steps=1000000",
        f"--train.micro_batch={options.micro_batch}",
        "--train.accumulate=1",
        f"--train.precision={options.precision}",
        *([f"--train.compile={str('compiled' in settings).lower()}"] if {"compiled", "eager"} & {*settings} else []),
        *(["--train.deterministic=false"] if "free" in settings else []),
        f"--train.threads={options.threads}",
        f"--train.device={options.device}",
        f"--train.kernels={'plain' if 'plain' in settings else 'auto'}",
    ]


def start(name: str, folder: Path, options: argparse.Namespace, loaded: Loaded) -> Side:
    """Start a side."""
    loop, *settings = name.split("+")
    spec = {
        "shape": dataclasses.asdict(shape_of(loaded)),
        "batches": str(folder / "batches.npy"),
        "precision": options.precision,
        "device": options.device,
        "compiled": "compiled" in settings,
        "threads": options.threads or cores(),
        "flags": configured(folder, options, settings),
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps(spec))
    environment = dict(os.environ)
    if "tcmalloc" in settings:
        environment["LD_PRELOAD"] = ctypes.util.find_library("tcmalloc_minimal") or sys.exit("no libtcmalloc_minimal")
    if "huge" in settings:
        environment["THP_MEM_ALLOC_ENABLE"] = "1"
    python = options.litgpt if loop == "litgpt" else sys.executable
    command = [python, str(Path(__file__).with_name("loops.py")), loop, str(path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return Side(name, subprocess.Popen(command, env=environment, text=True, **pipes))


def start_all(names: list[str], folder: Path, options: argparse.Namespace, loaded: Loaded) -> list[Side]:
    """Start sides and wait until they are ready: one by one, but together for a GPU, which hardly notices."""
    sides = []
    for name in names:
        sides.append(start(name, folder, options, loaded))
        if options.device == "cpu":
            sides[-1].ready()
    for side in sides if options.device == "cuda" else ():
        side.ready()
    return sides


def alternate(sides: list[Side], options: argparse.Namespace) -> None:
    """All rounds of a group; measures what sides use while they wait."""
    for number in range(options.warm_up + options.rounds):
        if number == 0 and options.device == "cuda":  # compilers work on the processor, where there is room for all
            for side in sides:
                side.ask()
            for side in sides:
                side.take(counts=False)
            continue
        for side in sides[:: -1 if number % 2 else 1]:
            waiting = [(other, other.cpu_seconds()) for other in sides if other is not side]
            side.ask()
            side.take(counts=number >= options.warm_up)
            for other, before in waiting:
                other.idle += other.cpu_seconds() - before


def compare(folder: Path, options: argparse.Namespace, loaded: Loaded) -> list[dict[str, Any]]:
    """Run every side; a row for each, tozan's last. Rows are printed as they become known."""
    [home] = start_all([options.home], folder, options, loaded)
    rows: list[dict[str, Any]] = []
    print(HEAD)
    for first in range(0, max(1, len(options.sides)), options.at_once):
        peers = start_all(options.sides[first : first + options.at_once], folder, options, loaded)
        begin = len(home.seconds)
        alternate([home, *peers], options)
        for peer in peers:
            rows.append(row(peer, home.seconds[begin:], loaded, home.peak_flops))
            show(rows[-1])
            peer.end()
    rows.append(row(home, home.seconds, loaded, home.peak_flops))
    show(rows[-1])
    home.end()
    return rows


def row(side: Side, beside: list[float], loaded: Loaded, peak_flops: float | None) -> dict[str, Any]:
    """What the table says of a side, given tozan's seconds in the same rounds."""
    rates = sorted(side.tokens / seconds for seconds in side.seconds)
    ratios = sorted(theirs / ours for theirs, ours in zip(side.seconds, beside, strict=True))
    shape = shape_of(loaded)
    rate = statistics.median(rates)
    return {
        "name": side.name,
        "tokens_per_second": {"median": rate, "low": rates[0], "high": rates[-1], "rounds": len(rates)},
        "tozan_over_it": {"median": statistics.median(ratios), "low": ratios[0], "high": ratios[-1]},
        "mfu": rate * model_flops(shape) / shape.sequence / peak_flops if peak_flops else None,
        "peak_memory_bytes": side.peak_memory(),
        "idle_cpu_seconds": side.idle,
        "seconds": side.seconds,
        "losses": side.losses,
    }


def show(row: dict[str, Any]) -> None:
    """Print a row."""
    rate, ratio = row["tokens_per_second"], row["tozan_over_it"]
    print(
        f"{row['name']:34}{rate['median']:9.0f}{rate['low']:7.0f}{rate['high']:7.0f}"
        f"{ratio['median']:9.2f}×{ratio['low']:6.2f}{ratio['high']:6.2f}{row['mfu']:7.1%}"
        f"{row['peak_memory_bytes'] / 1e6:7.0f} MB{row['idle_cpu_seconds']:6.2f} s",
        flush=True,
    )


def conclude(rows: list[dict[str, Any]]) -> None:
    """Print how tozan stands to the best peer."""
    if peers := [row for row in rows if not row["name"].startswith("tozan")]:
        best = min(peers, key=lambda row: row["tozan_over_it"]["median"])
        least = min(row["peak_memory_bytes"] for row in peers)
        print(f"{best['tozan_over_it']['median']:.2f}× the best peer ({best['name']}), ", end="")
        print(f"{rows[-1]['peak_memory_bytes'] / least:.2f} of the least memory of a peer")


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="gpt2-124m")
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm-up", type=int, default=1, help="rounds of each group that do not count")
    parser.add_argument("--at-once", type=int, default=2, help="peers in memory beside tozan")
    parser.add_argument("--sides", nargs="*", default=SIDES, help="pytorch, transformers or litgpt, + settings")
    parser.add_argument("--home", default="tozan", help="tozan, with settings if wanted")
    parser.add_argument("--litgpt", help="the Python interpreter of an environment with litgpt")
    parser.add_argument("--out", type=Path, help="write the result as JSON here")
    options = parser.parse_args()
    unknown = {setting for name in [*options.sides, options.home] for setting in name.split("+")[1:]} - {*SETTINGS}
    if unknown or (options.litgpt is None and any(name.startswith("litgpt") for name in options.sides)):
        parser.error(f"unknown settings: {sorted(unknown)}" if unknown else "litgpt needs --litgpt")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        standard_text(folder)
        loaded = load(None, configured(folder, options, []))
        steps = options.warm_up + options.rounds
        samples = open_data(loaded.config)[0].samples(0, steps * options.micro_batch)
        np.save(folder / "batches.npy", samples.reshape(steps, options.micro_batch, -1))
        threads = options.threads or cores()
        print(f"{options.preset}, {options.precision}, micro-batch {options.micro_batch}, {threads} threads")
        rows = compare(folder, options, loaded)
    conclude(rows)
    if options.out:
        given = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
        options.out.write_text(json.dumps({"options": given, "machine": machine.describe(), "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
