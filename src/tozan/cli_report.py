"""The verbs that show: `tozan report` and `tozan watch`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tozan.cli_words import FOLDER, examples


class PathOrVerb(click.Group):
    """`tozan report`'s own words first; what is none of them is a path to show."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """Treat an unknown first word as the argument of `page`."""
        return super().resolve_command(ctx, args if args[0] in self.commands else ["page", *args])


@click.group(
    short_help="Show a run, a measurement or a plan as a page.",
    cls=PathOrVerb,
    epilog=examples(
        "tozan report runs/first",
        "tozan report gemm.json --out gemm.html",
        "tozan report runs/first --machine machine.toml",
        "tozan report ledger runs/first",
    ),
)
def report() -> None:
    """Show a run, a measurement or a plan as a page: tozan report PATH ... (`tozan report page --help`)."""


@report.command(
    "page",
    short_help="Write the page of a run, measurement or plan.",
    epilog=examples("tozan report runs/first", "tozan report runs/first --trace first.json"),
)
@click.argument("path", type=FOLDER)
@click.option("--out", type=FOLDER, help="File to write; without it, report.html in the folder.")
@click.option("--machine", help="Of a run: machine or machine file to price it with; else its own machine.toml.")
@click.option("--trace", type=FOLDER, help="Of a run: write a trace of all ranks for ui.perfetto.dev, instead.")
@click.option("--ledger", is_flag=True, help="The same as `tozan report ledger PATH`.")
def page(path: Path, out: Path | None, machine: str | None, trace: Path | None, ledger: bool) -> None:
    """Write the page of PATH: a run, a result of `tozan bench` or a folder of them, or a plan's folder."""
    if ledger:
        print_ledger(path)
    elif trace:
        from tozan.report.trace import write

        click.echo(f"wrote {write(path, trace)}; open it at ui.perfetto.dev")
    else:
        from tozan import api

        click.echo(f"wrote {api.write_report(path, out, machine)}")


@report.command("ledger", epilog=examples("tozan report ledger runs/first"))
@click.argument("run", type=FOLDER)
def ledger(run: Path) -> None:
    """Print what the processes of RUN sent each other."""
    print_ledger(run)


def print_ledger(run: Path) -> None:
    """Print the sums of every rank's ledger."""
    from tozan.report.ledger import table

    click.echo(table(run))


@click.command(
    short_help="Watch a run on the terminal while it goes on.",
    epilog=examples("tozan watch runs/first", "tozan watch runs/first --once"),
)
@click.argument("run", type=FOLDER)
@click.option("--once", is_flag=True, help="Print one frame and leave.")
@click.option("--until-done", is_flag=True, help="Leave when the last step is done.")
@click.option(
    "--every", type=click.FloatRange(min=0.05), default=1.0, show_default=True, help="Seconds between two looks."
)
def watch(run: Path, once: bool, until_done: bool, every: float) -> None:
    """Watch RUN on the terminal while it goes on; it may be started later. Ctrl-C leaves, the run goes on."""
    from tozan.report.watch import Watch

    view = Watch(run)
    if once:
        view.once()
    else:
        view.show(every, until_done)
