"""The verbs of survival: `tozan agent` and `tozan chaos`."""

from __future__ import annotations

import os
import secrets
import signal
import sys
from pathlib import Path

import click

from tozan.cli_words import FOLDER, examples


@click.command(
    short_help="Train, with processes restarted when they are lost.",
    context_settings={"ignore_unknown_options": True},
    epilog=examples(
        "tozan agent run.toml --layout.data 4",
        "srun --ntasks-per-node 1 tozan agent run.toml --layout.data 16   in a job of several nodes",
    ),
)
@click.argument("config", type=FOLDER)
@click.argument("flags", nargs=-1, type=click.UNPROCESSED, metavar="[--TABLE.KEY VALUE]...")
def agent(config: Path, flags: tuple[str, ...]) -> None:
    """Train like `tozan train`, with all processes of the layout, and restart them when one is lost.

    Each process's state is copied into memory after every step, so that a loss costs one step at most. With one agent
    on each node of a job, a lost node costs a few steps, and the run goes on with those that are left.
    """
    from tozan.comm import place
    from tozan.recovery.supervise import supervise

    here = place.find()
    if here.world_size == 1:  # agents of several nodes are given one by whoever starts them
        os.environ.setdefault(place.VARIABLE, secrets.token_hex(32))
    status = supervise(config, flags, here.world_size, here.rank, (here.master, here.port))
    raise click.exceptions.Exit(status)


@click.command(
    short_help="Train in peace and under faults, and compare.",
    context_settings={"ignore_unknown_options": True},
    epilog=examples(
        "tozan chaos", "tozan chaos --faults 419 --seed 1", "tozan chaos --hosts 2", "tozan chaos --layout.zero 2"
    ),
)
@click.argument("flags", nargs=-1, type=click.UNPROCESSED, metavar="[--TABLE.KEY VALUE]...")
@click.option("--faults", type=click.IntRange(min=0), default=40, show_default=True, help="How many.")
@click.option("--seed", type=int, default=1, show_default=True, help="Of the script of faults.")
@click.option(
    "--steps", type=click.IntRange(min=20), help="Of the training; without it, 50 for each fault, 150 with hosts."
)
@click.option("--hosts", type=click.IntRange(min=1), default=1, show_default=True, help="Network namespaces; as root.")
@click.option("--out", type=FOLDER, default="chaos", show_default=True, help="Folder for both runs and the report.")
def chaos(flags: tuple[str, ...], faults: int, seed: int, steps: int | None, hosts: int, out: Path) -> None:
    """Train a small model twice, in peace and under faults, and compare; exits with 1 if anything was lost.

    Processes are killed, stopped and slowed down in every phase, files cannot be written or are damaged, gradients are
    not finite, connections drop; with --hosts, cables are pulled. Nobody intervenes: the two must end with equal bits.
    """
    from tozan.chaos.run import chaos as compare

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # not without taking hosts and mounts away
    report = compare(out, faults, seed, steps, hosts, flags, click.echo)
    click.echo(report.table())
    raise click.exceptions.Exit(0 if report.passed else 1)
