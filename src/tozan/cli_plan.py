"""The verbs of the planner: `tozan plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tozan.cli_words import FOLDER, examples


class ModelOrVerb(click.Group):
    """`tozan plan`'s own words first; what is none of them is a MODEL to plan."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """Treat an unknown first word as the argument of `layout`."""
        return super().resolve_command(ctx, args if args[0] in self.commands else ["layout", *args])


@click.group(
    cls=ModelOrVerb,
    epilog=examples(
        "tozan plan fugaku-13b --machine fugaku-2.0 --nodes 13824",
        "tozan plan 175B --machine a100-80 --tokens 300e9 --deadline 34",
    ),
)
def plan() -> None:
    """Which layout, how long, how much memory, what cost.

    `tozan plan MODEL --machine MACHINE` is short for `tozan plan layout MODEL ...`, whose --help has all options.
    """


@plan.command(
    "layout",
    short_help="Find the best layouts of a model on a machine.",
    epilog=examples("tozan plan gpt2-1.3b --machine fugaku-2.0 --nodes 4096 --sweep strong"),
)
@click.argument("model")
@click.option("--machine", default="", help="A machine that tozan ships, such as a100-80, or a machine file.")
@click.option("--nodes", type=int, help="Nodes to use; without it, all, or what --deadline or --budget need.")
@click.option("--tokens", type=float, help="Tokens of the run (300e9); without it, 20 per parameter.")
@click.option("--global-batch", type=click.IntRange(min=1), help="Samples of a step; without it, by model size.")
@click.option("--precision", type=click.Choice(["fp32", "bf16", "fp16"]), help="Without it, the machine's best.")
@click.option("--stack", default="tozan", show_default=True, help="The trainer to price, such as megatron-core.")
@click.option("--deadline", type=float, help="Days; without --nodes, finds the fewest that meet it.")
@click.option(
    "--budget",
    type=float,
    help="In the machine's currency; without --nodes, finds the soonest end in it.",
)
@click.option("--sweep", type=click.Choice(["strong", "weak", "both"]), help="Also price fewer nodes.")
@click.option("--html", type=FOLDER, help="File for the page that tozan report draws of a plan.")
@click.option("--out", type=FOLDER, help="Folder for plan.json (for tozan report), plan.toml and launch.sh.")
def plan_layout(model: str, machine: str, html: Path | None, out: Path | None, **options: Any) -> None:
    """Find the best layouts of MODEL: a preset, a config, or a size such as 13B."""
    from tozan import planner

    found = planner.plan(model, machine, **options)
    click.echo(found.text)
    if out:
        found.write(out)
    if html:
        from tozan.report import write_plan

        write_plan(found.data(), html)


@plan.command(
    "validate",
    short_help="Predict published tables, and print the errors.",
    epilog=examples("tozan plan validate --rows", "tozan plan validate --tables held-out/"),
)
@click.option("--rows", is_flag=True, help="Print every row of every table.")
@click.option(
    "--tables",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of other rows, in CSV files named as the tables are, to be predicted instead.",
)
def plan_validate(rows: bool, tables: Path | None) -> None:
    """Predict published tables, and print the errors beside two baselines."""
    from tozan import planner

    click.echo(planner.validate(rows, tables).text)


@plan.command("talk", short_help="Reproduce the talk that tozan grew from.", epilog=examples("tozan plan talk days"))
@click.argument("page", required=False, type=click.Choice(["days", "weather", "trends", "table"]))
def plan_talk(page: str | None) -> None:
    """Reproduce the pages of the talk that tozan grew from, conventions stated."""
    from tozan import planner

    click.echo(planner.talk(page).text)
