"""The verbs that measure: `tozan doctor` and `tozan bench`."""

from __future__ import annotations

from pathlib import Path

import click

from tozan.cli_words import FOLDER, examples


@click.group(epilog=examples("tozan bench calibrate"))
def bench() -> None:
    """Measure this machine."""


@bench.command("calibrate", epilog=examples("tozan bench calibrate --out mine.toml"))
@click.option("--out", type=FOLDER, default="machine.toml", show_default=True, help="File to write.")
def bench_calibrate(out: Path) -> None:
    """Measure this machine in a minute and write it as a machine file for `tozan plan`."""
    from tozan.bench.calibrate import calibrate

    calibrate(out)
    click.echo(f"wrote {out}; try: tozan plan gpt2-124m --machine {out}")
