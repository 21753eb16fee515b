"""The command line: one verb, one function. Nothing heavy is imported until a verb runs.

A user's mistakes (`UserError`) are printed without a traceback and end with exit code 2; what is not a user's mistake
keeps its traceback.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tozan import __version__
from tozan.cli_bench import bench, doctor
from tozan.cli_chaos import agent, chaos
from tozan.cli_plan import plan
from tozan.cli_report import report, watch
from tozan.cli_words import FOLDER, examples
from tozan.errors import EXIT_AGAIN

if TYPE_CHECKING:
    from tozan.errors import Problem

FLAGS = {"ignore_unknown_options": True}
"""For verbs that take `--table.key value`: what click does not know is passed on as it is."""


def main(arguments: list[str] | None = None) -> int:
    """Run a verb and return the exit code: 0, 2 for a user's mistakes, 130 after Ctrl-C, 75 to be started again.

    Args:
        arguments: words after `tozan`; None: those of this process.
    """
    from tozan.errors import UserError

    try:
        code = cli.main(args=arguments, prog_name="tozan", standalone_mode=False)
        sys.stdout.flush()
    except click.ClickException as error:
        error.show()
        return 2
    except UserError as error:
        print_problems(error.problems)
        return 2
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return 130
    except BrokenPipeError:
        # The reader (`head`, a pager) has gone before the last words; where it went earlier, click does the same.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code if isinstance(code, int) else 0


def print_problems(problems: Iterable[Problem]) -> None:
    """Print mistakes on standard error, each with its place and what to write instead."""
    found = list(problems)
    for problem in found:
        click.echo(click.style(str(problem.where), bold=True) + str(problem).removeprefix(problem.where), err=True)
    click.echo(click.style("1 problem" if len(found) == 1 else f"{len(found)} problems", fg="red"), err=True)


def print_warnings(problems: Iterable[Problem]) -> None:
    """Print what may be a mistake, but stops nothing."""
    for problem in problems:
        click.echo(click.style("warning: ", fg="yellow") + str(problem), err=True)


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=examples(
        "tozan demo                                  a small model from nothing, in minutes",
        "tozan data build texts/ --out data/mine     text to a data set",
        "tozan train run.toml                        train, or continue",
        "tozan generate runs/first --prompt 'Once'   let the model write",
    ),
)
@click.version_option(__version__, message="tozan %(version)s")
def cli() -> None:
    """Train large language models on CPU clusters, and on any machine PyTorch runs on."""


@cli.command(
    short_help="Make a model from nothing, from a corpus to a page.",
    epilog=examples(
        "tozan demo",
        "tozan demo --corpus ~/texts --minutes 10",
    ),
)
@click.option("--out", type=FOLDER, default="runs/demo", show_default=True, help="Folder for the data and the runs.")
@click.option("--corpus", default="standard-library", show_default=True, help="Or `debian`, or a folder of text.")
@click.option("--minutes", type=float, default=3.3, show_default=True, help="How long to train.")
def demo(out: Path, corpus: str, minutes: float) -> None:
    """Make a model from nothing: corpus, tokenizer, training, sample, page."""
    from tozan import demo as demonstration

    demonstration.run(out, corpus, minutes)


@cli.command(
    context_settings=FLAGS,
    epilog=examples(
        "tozan train configs/gpt2-tiny.toml",
        "tozan train run.toml --optim.lr 1e-3 --train.steps=50 --run.folder runs/second",
    ),
)
@click.argument("config", type=FOLDER)
@click.argument("flags", nargs=-1, type=click.UNPROCESSED, metavar="[--TABLE.KEY VALUE]...")
def train(config: Path, flags: tuple[str, ...]) -> None:
    """Train a model, or continue where an interrupted run stopped.

    CONFIG is a TOML file; --table.key flags replace its values. `tozan config schema --page` explains every key.
    """
    require_file_first(config)
    from tozan.comm.place import find
    from tozan.config import load

    loaded = load(config, flags, to_run=True)
    first = find().rank == 0
    if first:
        print_warnings(loaded.warnings)
        click.echo(f"run folder: {loaded.config.run.folder}")
    from tozan import train as trainer
    from tozan.report.live import Live

    try:
        with Live(loaded.config.train.steps) if first else nullcontext() as live:
            result = trainer.train(loaded, live.record if live else None)
    except trainer.Interrupted as stop:
        click.echo(str(stop), err=True)
        raise click.exceptions.Exit(130 if stop.signal == signal.SIGINT else EXIT_AGAIN) from None
    except trainer.SilentError:  # rank 0 has said it
        raise click.exceptions.Exit(trainer.EXIT_SILENT) from None
    if first:
        click.echo(f"done: {result.step:,} steps in {result.folder}; see it with: tozan report {result.folder}")


def node_shape(_context: click.Context, _option: click.Parameter, text: str) -> tuple[int, ...]:
    """The lengths in `2x3x2`; none for an empty text."""
    sides = text.split("x") if text else []
    if len(sides) > 3 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise click.BadParameter(f"{text!r} is no shape of nodes; write one to three lengths, such as 2x3x2")
    return tuple(map(int, sides))


@cli.command(
    short_help="Start a run under torchrun, mpirun, Slurm or PJM.",
    context_settings=FLAGS,
    epilog=examples(
        "tozan launch run.toml --launcher slurm --layout.data 8 --nodes 2 --cores 48 --dry-run",
        "tozan launch run.toml --launcher pjm --nodes 12 --shape 2x3x2 --queue small --stage data/mine --dry-run",
    ),
)
@click.argument("config", type=FOLDER)
@click.argument("flags", nargs=-1, type=click.UNPROCESSED, metavar="[--TABLE.KEY VALUE]...")
@click.option("--launcher", type=click.Choice(["torchrun", "mpirun", "slurm", "pjm"]), help="Default: what is here.")
@click.option("--nodes", type=click.IntRange(min=1), default=1, show_default=True, help="Machines.")
@click.option("--cores", type=click.IntRange(min=0), default=0, help="Cores of a node; 0: ranks bind themselves.")
@click.option("--minutes", type=click.IntRange(min=0), default=0, help="Time limit; in a batch system 60 by default.")
@click.option("--queue", help="Slurm's partition, PJM's resource group.")
@click.option("--account", help="Slurm's account, PJM's group.")
@click.option("--shape", default="", callback=node_shape, help="PJM's node shape, such as 2x3x2.")
@click.option("--stage", multiple=True, help="PJM: file that every rank reads, copied to the nodes by llio_transfer.")
@click.option("--hosts", help="File of host names, for mpirun on several nodes.")
@click.option("--agent", is_flag=True, help="One agent on each node, which starts its processes and watches over them.")
@click.option("--restarts", type=click.IntRange(min=0), default=0, help="Starts after a lost process.")
@click.option("--dry-run", is_flag=True, help="Print the script and start nothing.")
def launch(config: Path, flags: tuple[str, ...], launcher: Any, dry_run: bool, agent: bool, **options: Any) -> None:
    """Start a run with as many processes as its layout needs, under torchrun, mpirun, Slurm or PJM."""
    require_file_first(config)
    from tozan.comm.jobs import Job, start
    from tozan.config import load

    processes = load(config, flags).config.layout.processes
    ranks = options["nodes"] if agent else processes
    command = (sys.executable, "-m", "tozan", "agent" if agent else "train", str(config.resolve()), *flags)
    job = Job(command, ranks, agents=agent, **options)
    raise click.exceptions.Exit(start(job, launcher, dry_run=dry_run))


def require_file_first(config: Path) -> None:
    """Refuse a flag where the file belongs."""
    if str(config).startswith("-"):
        verb = click.get_current_context().command_path
        raise click.UsageError(f"the file comes first, flags after it: {verb} run.toml {config} ...")


@cli.group()
def data() -> None:
    """Turn text into a data set, look into it, check it."""


@data.command(
    "build",
    epilog=examples(
        "tozan data build standard-library --out data/python",
        "tozan data build texts/ 'more/*.jsonl.zst' --out data/mine --vocabulary 32000",
    ),
)
@click.argument("sources", nargs=-1, required=True)
@click.option("--out", type=FOLDER, required=True, help="Folder to write; appears when it is complete.")
@click.option("--vocabulary", type=click.IntRange(min=1), default=8192, show_default=True, help="Tokens to learn.")
@click.option("--tokenizer", type=FOLDER, help="A tokenizer.json to use instead of training one.")
@click.option("--validation", type=float, default=0.05, show_default=True, help="Share of documents held out.")
@click.option("--shard-megabytes", type=click.IntRange(min=1), default=64, show_default=True, help="Size of a shard.")
@click.option("--seed", type=int, default=0, show_default=True, help="Chooses the split and the order of documents.")
@click.option("--limit-megabytes", type=click.IntRange(min=1), help="Use at most this much text.")
@click.option("--licence", default="unknown", show_default=True, help="Of texts that do not state their own.")
@click.option("--field", default="text", show_default=True, help="Field or column that holds the text.")
@click.option("--encoding", default="utf-8", show_default=True, help="Of text files.")
@click.option(
    "--errors",
    type=click.Choice(["refuse", "replace"]),
    default="refuse",
    show_default=True,
    help="What to do with bytes that are no text in that encoding.",
)
@click.option("--overwrite", is_flag=True, help="Replace another data set at --out.")
def build_data(
    sources: tuple[str, ...], out: Path, shard_megabytes: int, limit_megabytes: int | None, **options: Any
) -> None:
    """Write text as tar shards with an index and a manifest.

    SOURCES are files, folders or globs of text, JSONL or Parquet (also .gz and .zst), `standard-library` (the
    documentation and source of Python itself), or `debian` (Japanese and English documentation).
    """
    from tozan import api

    limit = None if limit_megabytes is None else limit_megabytes * 1_000_000
    api.build_data(sources, out, limit=limit, shard_bytes=shard_megabytes << 20, on_event=click.echo, **options)


@data.command("inspect", short_help="Say what a data set holds.", epilog=examples("tozan data inspect data/mine"))
@click.argument("path", type=FOLDER)
@click.option("--json", "as_json", is_flag=True, help="Print the manifest.")
def inspect_data(path: Path, as_json: bool) -> None:
    """Say what a data set holds: tokens, documents, licences, shards."""
    from tozan.data import inspect

    found = inspect(path)
    click.echo(json.dumps(found.manifest.model_dump(), indent=2, ensure_ascii=False) if as_json else found)


@data.command("verify", short_help="Check every byte of a data set.", epilog=examples("tozan data verify data/mine"))
@click.argument("path", type=FOLDER)
def verify_data(path: Path) -> None:
    """Check every byte of a data set; names each bad shard and member, and exits with 2 if there are any."""
    from tozan.data import verify
    from tozan.errors import UserError

    found = verify(path)
    if found:
        raise UserError(*found)
    click.echo(f"{path}: all well")


@cli.command(
    epilog=examples(
        'tozan generate runs/first --prompt "def main():"',
        'tozan generate runs/first/checkpoints/step-00001000 --prompt "Once" --temperature 0',
    )
)
@click.argument("checkpoint", type=FOLDER)
@click.option("--prompt", default="", help="The text to continue; without it, a new document is begun.")
@click.option("--tokens", type=click.IntRange(min=1), default=200, show_default=True, help="Tokens to add at most.")
@click.option("--temperature", type=float, default=0.8, show_default=True, help="0: always the likeliest token.")
@click.option("--top-k", type=int, help="Choose among this many likeliest tokens.")
@click.option("--top-p", type=float, help="Choose among the likeliest tokens that hold this probability together.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the choices.")
def generate(checkpoint: Path, prompt: str, **options: Any) -> None:
    """Let a model continue a text. CHECKPOINT is a run folder or one checkpoint."""
    from tozan import api

    pieces = api.generate(checkpoint, prompt, **options)
    click.echo(prompt, nl=False)
    for piece in pieces:
        click.echo(piece, nl=False)
    click.echo()


@cli.command("eval", epilog=examples("tozan eval runs/first", "tozan eval runs/first --data data/other --samples 1000"))
@click.argument("checkpoint", type=FOLDER)
@click.option("--data", type=FOLDER, help="A data set; without it, the one that the model was trained on.")
@click.option(
    "--samples", type=click.IntRange(min=1), default=256, show_default=True, help="Held-out samples to score."
)
@click.option("--precision", type=click.Choice(["fp32", "bf16", "fp16", "fp64"]), default="fp32", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def evaluate(checkpoint: Path, data: Path | None, samples: int, precision: str, as_json: bool) -> None:
    """Score a model on held-out text. CHECKPOINT is a run folder or one checkpoint."""
    from tozan import api

    scores = api.evaluate(checkpoint, data, samples=samples, precision=precision)
    if as_json:
        click.echo(json.dumps(scores))
        return
    for name, value in scores.items():
        shown = f"{value:,.4f}" if isinstance(value, float) else f"{value:,}"
        click.echo(f"{name.replace('_', ' '):<15} {shown}")


@cli.command(
    short_help="Convert from or to a Hugging Face folder.",
    epilog=examples(
        "tozan convert runs/first exported/",
        "tozan convert gpt2/ imported/",
    ),
)
@click.argument("source", type=FOLDER)
@click.argument("destination", type=FOLDER)
def convert(source: Path, destination: Path) -> None:
    """Convert a Hugging Face folder to a checkpoint, or a checkpoint to a Hugging Face folder.

    A SOURCE with a config.json is Hugging Face's (GPT-2 or LLaMA, safetensors); anything else is a run or a checkpoint.
    """
    from tozan import api

    click.echo(f"wrote {api.convert(source, destination)}")


cli.add_command(plan)
cli.add_command(report)
cli.add_command(watch)
cli.add_command(bench)
cli.add_command(doctor)
cli.add_command(agent)
cli.add_command(chaos)


@cli.group()
def config() -> None:
    """Show, check and explain configs."""


@config.command(
    "show",
    short_help="Print every value and where it comes from.",
    context_settings=FLAGS,
    epilog=examples(
        "tozan config show run.toml",
        "tozan config show run.toml --model.preset gpt2-350m --toml > complete.toml",
        "tozan config show --presets",
    ),
)
@click.argument("config", type=FOLDER, required=False)
@click.argument("flags", nargs=-1, type=click.UNPROCESSED, metavar="[--TABLE.KEY VALUE]...")
@click.option("--presets", is_flag=True, help="List the shapes that tozan ships, instead.")
@click.option("--toml", is_flag=True, help="Print a complete config, origins as comments.")
def show_config(config: Path | None, flags: tuple[str, ...], presets: bool, toml: bool) -> None:
    """Print every value of a config and where it comes from: default, preset, file and line, or flag."""
    from tozan.config import load, show

    screen = sys.stdout.isatty()
    if presets:
        show.print_table(show.PRESET_HEADINGS, show.preset_rows(), screen=screen)
        return
    if config is None:
        raise click.UsageError("name a config file, or --presets")
    require_file_first(config)
    loaded = load(config, flags)
    print_warnings(loaded.warnings)
    if toml:
        click.echo(loaded.toml(), nl=False)
    else:
        show.print_table(show.VALUE_HEADINGS, show.value_rows(loaded), screen=screen)


@config.command(
    "check",
    short_help="Check a config without training.",
    context_settings=FLAGS,
    epilog=examples(
        "tozan config check run.toml",
        "tozan config check run.toml --here --train.steps 50",
    ),
)
@click.argument("config", type=FOLDER)
@click.argument("flags", nargs=-1, type=click.UNPROCESSED, metavar="[--TABLE.KEY VALUE]...")
@click.option("--here", is_flag=True, help="Also check what the run needs here: data, folders, processes, packages.")
def check_config(config: Path, flags: tuple[str, ...], here: bool) -> None:
    """Check a config without training; exits with 2 if there are mistakes."""
    require_file_first(config)
    from tozan.config import load, show

    loaded = load(config, flags, to_run=here)
    print_warnings(loaded.warnings)
    click.echo(f"{config}: well. {show.summary(loaded.config)}")


@config.command(
    "schema",
    short_help="Print the JSON Schema of a config.",
    epilog=examples(
        "tozan config schema > schema.json",
        "tozan config schema --page > config.md",
    ),
)
@click.option("--page", is_flag=True, help="Print the reference page (Markdown) instead.")
def print_schema(page: bool) -> None:
    """Print the JSON Schema of a config, which editors use to complete and check."""
    from tozan.config import reference

    click.echo(reference.page() if page else reference.schema_text(), nl=False)
