"""The verbs of survival: `tozan agent`."""

from __future__ import annotations

from pathlib import Path

import click

from tozan.cli_words import FOLDER, examples


@click.command(
    context_settings={"ignore_unknown_options": True},
    epilog=examples("tozan agent run.toml --layout.data 4", "tozan agent run.toml --recovery.restarts 3"),
)
@click.argument("config", type=FOLDER)
@click.argument("flags", nargs=-1, type=click.UNPROCESSED, metavar="[--TABLE.KEY VALUE]...")
def agent(config: Path, flags: tuple[str, ...]) -> None:
    """Train like `tozan train`, with all processes of the layout, and restart them when one is lost.

    Each process's state is copied into memory after every step, so that a loss costs one step at most.
    """
    from tozan.config import load
    from tozan.recovery.agent import Policy, supervise

    found = load(config, flags).config
    table = found.recovery
    policy = Policy(table.copies, table.restarts, table.stopped)
    words = ["train", str(config.resolve()), *flags]
    log = Path(found.run.folder) / "recovery.jsonl"
    raise click.exceptions.Exit(supervise(words, found.layout.processes, policy, log))
