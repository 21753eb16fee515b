"""The page of a plan: a folder that `tozan plan ... --out` wrote, with its plan.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tozan.amounts import days, many, percent, scaled, seconds, three
from tozan.errors import Problem, UserError
from tozan.planner.losses import Losses
from tozan.report.drawing import Figure
from tozan.report.figures import pipeline, plans
from tozan.report.figures.plans import size
from tozan.report.figures.torus import torus as torus_map
from tozan.report.page import Page, Table
from tozan.report.run_page import value_text
from tozan.report.words import Tile, amount
from tozan.schedules import Action, Step

HEAD = ("layout", "s/step", "80% interval", "TFLOP/s per device", "of peak", "days", "memory", "MWh")
NOTE = "TFLOP/s are the model's, recomputation not counted, of the nominal peak. Memory of the fullest device."
PLAN_FACTS = ("machine", "nodes", "devices_per_node", "stack", "precision", "global_batch", "steps", "tried")
Plan = dict[str, Any]


def read(path: Path) -> Plan:
    """Read a plan's folder, or its plan.json.

    Raises:
        UserError: it is none, or of another version.
    """
    file = path / "plan.json" if path.is_dir() else path
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            Problem(str(file), f"cannot be read: {error}", "write it with `tozan plan ... --out`")
        ) from None
    if not isinstance(found, dict) or found.get("format") != "tozan plan" or found.get("version") != 1:
        raise UserError(Problem(str(file), "no plan of version 1", "write it with `tozan plan ... --out`"))
    if not found.get("layouts"):
        raise UserError(Problem(str(file), "holds no layout", "write it with `tozan plan ... --out`"))
    return found


def page(plan: Plan) -> Page:
    """The page of a plan: of what `read` has read, or `planner.Plan.data` says."""
    best = plan["layouts"][0]
    names = [name_of(one) for one in plan["layouts"]]
    head = (*HEAD, f"cost, {_currency(plan)}")
    rows = [_row(one, name) for one, name in zip(plan["layouts"], names, strict=True)]
    model, machine = str(plan["model"]), str(plan["machine"])
    return Page(
        kind="tozan plan",
        title=f"{model} on {many(plan['nodes'], 'node')}",
        when=machine,
        tiles=_tiles(plan, best),
        summary=_summary(plan, best, names),
        advice=[
            *plan.get("notes", []),
            "Run it: the `launch.sh` that `tozan plan ... --out` writes starts its `plan.toml`; `tozan report RUN "
            "--machine FILE` then sets this prediction beside the measurement.",
        ],
        figures=figures(plan),
        wide=[
            Table(
                "Best layouts" if plan.get("fits", True) else "Nothing fits; nearest layouts",
                rows,
                _note(plan, best),
                head,
            )
        ],
        facts=[
            Table("Model", [("model", model), *_plain(plan.get("shape"), plan.get("parameters"))]),
            Table("Plan", _plain({key: plan.get(key) for key in PLAN_FACTS})),
            Table("Best layout", _plain(best["layout"])),
        ],
        foot="Seconds are predicted; in 8 cases of 10 a measured step lies in the interval.",
    )


def figures(plan: Plan) -> list[Figure]:
    """Every figure that the plan has data for."""
    layouts, best = plan["layouts"], plan["layouts"][0]
    names = [name_of(one) for one in layouts]
    made = [plans.layouts(layouts, names), plans.breakdown(layouts, names)]
    made.append(plans.memory(best["memory"], best.get("memory_limit"), "the fullest device"))
    made += [_pipeline(plan), _torus(plan, best["layout"])]
    curves = plan.get("curves") or {}
    made += [plans.curves(curves.get(kind) or [], kind) for kind in ("strong", "weak")]
    return [one for one in made if one is not None]


def _pipeline(plan: Plan) -> Figure | None:
    """The timeline of the best layout's pipeline, as the planner has replayed it."""
    table = plan.get("pipeline")
    if not table or not table.get("timeline"):
        return None
    steps = [
        Step(stage, Action(kind, microbatch, chunk), start, end)
        for stage, kind, microbatch, chunk, start, end in table["timeline"]
    ]
    return pipeline.of_plan(str(table["schedule"]), int(table["stages"]), int(table["microbatches"]), steps)


def _torus(plan: Plan, layout: Mapping[str, Any]) -> Figure | None:
    """Ranks on the torus, coloured by the replica they belong to, or by pipeline stage."""
    found = plan.get("torus")
    if not found:
        return None
    table = found.get("ranks") or []
    places = {int(k): v for k, v in table.items()} if isinstance(table, dict) else dict(enumerate(table))
    axis = "pipeline" if int(layout.get("pp", 1)) > 1 else "tensor" if int(layout.get("tp", 1)) > 1 else "data"
    parts = {"pipeline": "pp", "tensor": "tp", "data": "dp"}
    each = max(1, len(places) // max(1, int(layout.get("pp", 1))))
    if axis == "pipeline":
        group = {rank: rank // each for rank in places}
    else:
        group = {rank: rank // max(1, int(layout.get(parts["tensor"], 1))) for rank in places}
    return torus_map(found["shape"], places, group, axis)


def _note(plan: Plan, best: Mapping[str, Any]) -> str:
    """The table's conventions."""
    said = [NOTE]
    if best.get("failure_days"):
        between, write = 86_400 * float(best["failure_days"]), float(best["checkpoint_seconds"])
        lost = Losses(float(best["overhead"]), between, write, 60 * float(best["checkpoint_minutes"]))
        said.append(f"Days include {lost}.")
    if plan.get("price_per_device_hour"):
        said.append(f"Cost: {float(plan['price_per_device_hour']):g} {_currency(plan)} for a device and hour.")
    return " ".join(said)


def _currency(plan: Plan) -> str:
    """The money of costs."""
    return str(plan.get("currency") or "USD")


def name_of(one: Mapping[str, Any]) -> str:
    """A layout in a few words: `pp8 dp32 tp4, micro-batch 1, ZeRO-1`."""
    return str(one["name"])


def _plain(value: Mapping[str, Any] | None, parameters: int | None = None) -> list[tuple[str, ...]]:
    """The scalars of a table, as rows."""
    rows: list[tuple[str, ...]] = [("parameters", f"{parameters:,}")] if parameters else []
    for name, item in (value or {}).items():
        if isinstance(item, str | int | float):
            rows.append((str(name).replace("_", " "), value_text(item)))
    return rows


def _row(one: Mapping[str, Any], name: str) -> tuple[str, ...]:
    def number(key: str) -> str:
        return "—" if one.get(key) is None else three(float(one[key]))

    return (
        name,
        number("seconds"),
        f"{number('low')} – {number('high')}",
        f"{float(one['flops_per_device']) / 1e12:.3g}" if one.get("flops_per_device") else "—",
        percent(float(one["peak_share"])) if one.get("peak_share") else "—",
        number("days"),
        size(sum(one["memory"].values())),
        number("energy"),
        number("cost"),
    )


def _tiles(plan: Plan, best: Mapping[str, Any]) -> list[Tile]:
    made = [
        Tile(
            "A step",
            seconds(float(best["seconds"])),
            f"{seconds(float(best['low']))} to {seconds(float(best['high']))}",
        ),
        Tile("The run", days(float(best["days"])), f"{amount(float(plan['tokens']))} tokens"),
        Tile(
            "Speed",
            scaled(float(best["flops_per_device"]), "FLOP/s"),
            f"per device, {percent(float(best['peak_share']))} of peak",
        ),
        Tile("Memory", size(sum(best["memory"].values())), "on the fullest device"),
    ]
    if best.get("energy"):
        made.append(Tile("Energy", f"{three(float(best['energy']))} MWh", "whole run"))
    if best.get("cost"):
        made.append(Tile(f"Cost, {_currency(plan)}", amount(float(best["cost"])), "whole run"))
    return made


def _summary(plan: Plan, best: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    low, high = (float(best[end]) / float(best["seconds"]) * float(best["days"]) for end in ("low", "high"))
    said = [
        f"{plan['model']} trains on {amount(float(plan['tokens']))} tokens in {days(float(best['days']))} "
        f"({days(low)} to {days(high)}) on {many(plan['nodes'], 'node')}, laid out as {names[0]}."
    ]
    parts = sorted(best["breakdown"].items(), key=lambda item: -float(item[1]))[:3]
    shares = ", ".join(f"{name} {percent(float(value) / float(best['seconds']))}" for name, value in parts)
    said.append(f"Most of a step goes into {shares}.")
    if len(names) > 1:
        lost = float(plan["layouts"][1]["seconds"]) / float(best["seconds"]) - 1
        said.append(f"The next best, {names[1]}, takes {percent(lost)} longer.")
    return said
