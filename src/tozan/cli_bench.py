"""The verbs that measure: `tozan doctor` and `tozan bench`."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tozan.cli_words import FOLDER, examples

if TYPE_CHECKING:
    from tozan.bench.result import Result

PRECISIONS = ("fp32", "bf16", "fp16")


def numbers(_context: click.Context, _option: click.Parameter, text: str | None) -> tuple[int, ...] | None:
    """The whole numbers in `1,2,4`."""
    parts = None if text is None else [part.strip() for part in text.split(",")]
    if parts and not all(part.isdecimal() and int(part) for part in parts):
        raise click.BadParameter(f"{text!r}: write whole numbers from 1, with commas between them")
    return tuple(map(int, parts)) if parts else None


def words(*known: str) -> Callable[[click.Context, click.Parameter, str], tuple[str, ...]]:
    """What reads a list of some of the known words: `bf16,fp32`."""

    def read(_context: click.Context, _option: click.Parameter, text: str) -> tuple[str, ...]:
        parts = tuple(part.strip() for part in text.split(","))
        if not set(parts) <= set(known):
            raise click.BadParameter(f"{text!r}: write one or more of {', '.join(known)}, with commas between them")
        return parts

    return read


OUT = click.option("--out", type=FOLDER, help="Also write the result as JSON here.")
SECONDS = click.option("--seconds", type=float, default=0.2, show_default=True, help="On each measurement, at least.")
REPEATS = click.option("--repeats", type=click.IntRange(1), default=6, show_default=True, help="Of each, at least.")


def finish(result: Result, page: Sequence[object], out: Path | None) -> None:
    """Print a measurement and write its file."""
    from tozan.bench.show import show

    show(*page)
    if out:
        result.write(out)
        click.echo(f"wrote {out}")


@click.command(
    short_help="Examine this machine: what is wrong, and what mends it.",
    epilog=examples("tozan doctor", "tozan doctor --json > machine.json", "srun -n 1 tozan doctor"),
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@OUT
def doctor(as_json: bool, out: Path | None) -> None:
    """Examine this machine in a minute: what it is, what it does, what is wrong, what that costs, what mends it."""
    from tozan.bench import doctor as examination
    from tozan.bench.doctor_page import page

    result = examination.run()
    if as_json:
        click.echo(result.json_text(), nl=False)
        if out:
            result.write(out)
        return
    finish(result, page(result), out)


@click.group(epilog=examples("tozan bench gemm gpt2-124m", "tozan bench compare before.json after.json"))
def bench() -> None:
    """Measure this machine."""


@bench.command(
    "calibrate",
    short_help="Measure this machine for `tozan plan`.",
    epilog=examples("tozan bench calibrate --out mine.toml"),
)
@click.option("--out", type=FOLDER, default="machine.toml", show_default=True, help="File to write.")
def bench_calibrate(out: Path) -> None:
    """Measure this machine in three minutes and write it as a machine file for `tozan plan`."""
    from tozan.bench.calibrate import calibrate

    calibrate(out)
    click.echo(f"wrote {out}; try: tozan plan gpt2-124m --machine {out}")


@bench.command(
    "gemm",
    short_help="Measure the matrix products of a model's step.",
    epilog=examples("tozan bench gemm gpt2-124m --threads 1,2", "tozan bench gemm fugaku --out gemm.json"),
)
@click.argument("model", default="gpt2-124m")
@click.option("--micro-batch", type=click.IntRange(1), help="Samples of a pass; without it, about 4,096 tokens.")
@click.option("--tensor", callback=numbers, help="Ranks that share every matrix; fugaku: 1,2,4,8,16,32.")
@click.option("--precision", callback=words(*PRECISIONS), default="bf16,fp32", show_default=True, help="Compute types.")
@click.option("--threads", callback=numbers, help="Thread counts; without it, 1 and all cores.")
@SECONDS
@REPEATS
@OUT
def bench_gemm(
    model: str,
    micro_batch: int | None,
    tensor: tuple[int, ...] | None,
    precision: tuple[str, ...],
    threads: tuple[int, ...] | None,
    seconds: float,
    repeats: int,
    out: Path | None,
) -> None:
    """Measure every matrix product of a model's step, forward and backward.

    MODEL is a preset, a config, a size such as 13B, or `fugaku`: a layer 7,168 wide, split over 1 to 32 ranks.
    """
    from tozan.bench import gemm

    work = gemm.work(model, micro_batch, tensor, precision, threads, seconds, repeats)
    result = gemm.run(work)
    finish(result, gemm.page(result), out)


@bench.command(
    "compare",
    short_help="Say which differences exceed the noise.",
    epilog=examples("tozan bench compare before.json after.json"),
)
@click.argument("a", type=FOLDER)
@click.argument("b", type=FOLDER)
@click.option("--anyway", is_flag=True, help="Also if they are of different kinds or from different machines.")
def bench_compare(a: Path, b: Path, anyway: bool) -> None:
    """Say row by row how two measurements differ, and which differences exceed the noise."""
    from tozan.bench.compare import compare
    from tozan.bench.result import read
    from tozan.bench.show import comparison, show

    show(*comparison(compare(read(a), read(b)), anyway))


@bench.command(
    "step",
    short_help="Measure a step of the trainer beside its floor.",
    context_settings={"ignore_unknown_options": True},
    epilog=examples(
        "tozan bench step gpt2-124m",
        "tozan bench step configs/gpt2-tiny.toml --train.precision fp32 --out step.json",
    ),
)
@click.argument("model")
@click.argument("flags", nargs=-1, type=click.UNPROCESSED, metavar="[--TABLE.KEY VALUE]...")
@click.option("--steps", type=click.IntRange(1), default=6, show_default=True, help="Steps to measure, after two.")
@SECONDS
@REPEATS
@OUT
def bench_step(model: str, flags: tuple[str, ...], steps: int, seconds: float, repeats: int, out: Path | None) -> None:
    """Measure a step of the trainer beside its floor: matrix products and memory at measured rates.

    MODEL is a preset or a config; --table.key flags replace its values. The tokens are random.
    """
    from tozan.bench import step

    result = step.run(model, flags, steps, seconds, repeats)
    finish(result, step.page(result), out)


@bench.command(
    "collectives",
    short_help="Measure collectives by size and type.",
    epilog=examples(
        "tozan bench collectives --ranks 2,4",
        "srun -n 8 tozan bench collectives --out collectives.json",
    ),
)
@click.option("--operations", default="all", show_default=True, help="all_reduce,all_gather,… with commas.")
@click.option("--kilobytes", default="1,32,1024,16384", show_default=True, callback=numbers, help="Sizes, in KiB.")
@click.option("--dtypes", default="fp32,bf16", show_default=True, callback=words(*PRECISIONS, "fp64"), help="Types.")
@click.option("--ranks", default="2", show_default=True, callback=numbers, help="Local processes, without a launcher.")
@click.option("--interface", default="lo", show_default=True, help="Network interface between local processes.")
@click.option("--repeats", type=click.IntRange(1), default=8, show_default=True, help="Of each.")
@OUT
def bench_collectives(
    operations: str,
    kilobytes: tuple[int, ...],
    dtypes: tuple[str, ...],
    ranks: tuple[int, ...],
    interface: str,
    repeats: int,
    out: Path | None,
) -> None:
    """Measure each collective by size and type: between local processes, or over the ranks of a job.

    Under torchrun, mpirun, Slurm or PJM every rank of the job takes part and rank 0 prints.
    """
    from tozan.bench import collectives

    sizes = tuple(size << 10 for size in kilobytes)
    chosen = tuple(collectives.FACTORS) if operations == "all" else tuple(operations.split(","))
    result = collectives.run(collectives.Work(chosen, sizes, dtypes, ranks, repeats, interface))
    if result:
        finish(result, collectives.page(result), out)


@bench.command(
    "io",
    short_help="Measure tar shards against single files.",
    epilog=examples("tozan bench io", "tozan bench io --documents 2000 --folder /mnt/shared"),
)
@click.option("--documents", type=click.IntRange(1), default=20_000, show_default=True, help="How many to write.")
@click.option("--bytes", "size", type=click.IntRange(1), default=3_000, show_default=True, help="In each.")
@click.option("--shard-megabytes", type=click.IntRange(1), default=8, show_default=True, help="Size of a shard.")
@click.option("--samples", type=click.IntRange(1), default=5_000, show_default=True, help="To read as training does.")
@click.option("--passes", type=click.IntRange(1), default=6, show_default=True, help="Warm passes over all documents.")
@click.option("--folder", type=FOLDER, help="Where to write (and remove) them; without it, the temporary folder.")
@click.option("--drop-caches", "drop", is_flag=True, help="Also drop the kernel's caches first (root only).")
@OUT
def bench_io(shard_megabytes: int, out: Path | None, **options: Any) -> None:
    """Measure tar shards against one file for each document: inodes, opens, latency, reads/s."""
    from tozan.bench import io

    result = io.run(io.Work(shard_bytes=shard_megabytes << 20, **options))
    finish(result, io.page(result), out)


@bench.command(
    "scaling",
    short_help="Run jobs on growing numbers of processes.",
    context_settings={"ignore_unknown_options": True},
    epilog=examples(
        "tozan bench scaling --model gpt2-124m --ranks 1,2 --global-batch 8",
        "tozan bench scaling --setup talk-124m --ranks 1,2 --global-batch 16 --steps 3 --out strong.json",
    ),
)
@click.argument("flags", nargs=-1, type=click.UNPROCESSED, metavar="[--TABLE.KEY VALUE]...")
@click.option("--setup", help="talk-124m, talk-124m-weak or talk-1.3b; the options below replace its values.")
@click.option("--model", help="A preset.")
@click.option("--ranks", callback=numbers, help="Numbers of processes, such as 1,2,4.")
@click.option("--mode", type=click.Choice(["strong", "weak"]), help="Same global batch, or one that grows.")
@click.option("--axis", type=click.Choice(["data", "tensor"]), help="What grows with the ranks.")
@click.option("--micro-batch", type=click.IntRange(1), help="Samples of a pass.")
@click.option("--global-batch", type=click.IntRange(1), help="Samples of a step; in weak scaling, of one rank.")
@click.option("--precision", type=click.Choice(PRECISIONS), help="Compute type.")
@click.option("--steps", type=click.IntRange(2), default=5, show_default=True, help="Of each job; the first warms up.")
@click.option("--data", type=FOLDER, help="A data set; without it, one is made from the standard library.")
@click.option("--machine", help="A machine, or a file of bench calibrate: also print what the planner predicts.")
@click.option("--launcher", help="Command that starts {ranks} processes, such as 'srun -n {ranks}'; default: torchrun.")
@OUT
def bench_scaling(
    flags: tuple[str, ...],
    setup: str | None,
    steps: int,
    data: Path | None,
    machine: str | None,
    launcher: str | None,
    out: Path | None,
    **changes: Any,
) -> None:
    """Run real training jobs on growing numbers of processes, and say how well they scale.

    Strong scaling keeps the global batch, weak scaling lets it grow. Step times and phases are those that the jobs
    write down themselves.
    """
    from tozan.bench import scaling

    chosen = scaling.setup(setup, {name: value for name, value in changes.items() if value is not None})
    start = tuple(shlex.split(launcher)) if launcher else None
    result = scaling.run(chosen, scaling.Jobs(steps, machine=machine, flags=flags, data=data, launcher=start))
    finish(result, scaling.page(result), out)
