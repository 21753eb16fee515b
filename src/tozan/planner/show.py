"""A plan as text, config and launch script."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from tozan.amounts import days, many, three
from tozan.models.arithmetic import parameters

if TYPE_CHECKING:
    from tozan.planner.plan import Choice, Plan


def name(choice: Choice) -> str:
    """A layout in one line: `pp8 dp32 tp4, micro-batch 1, interleaved ×6, ZeRO-1, recompute selective`."""
    one = choice.layout
    words = [" ".join(f"{axis}{one[axis]}" for axis in ("pp", "dp", "cp", "tp") if one[axis] > 1) or "one device"]
    if one["grid"]:
        words[0] += f" ({one['grid']}×{one['grid']}" + (f"×{one['depth']})" if one["depth"] > 1 else ")")
    words.append(f"micro-batch {one['micro_batch']}")
    if one["chunks"] > 1:
        words.append(f"interleaved ×{one['chunks']}")
    if one["zero_bubble"]:
        words.append("zero-bubble")
    if one["zero"]:
        words.append(f"ZeRO-{one['zero']}")
    if one["sequence_parallel"]:
        words.append("sequence parallel")
    if one["recompute"] != "none":
        words.append(f"recompute {one['recompute']}")
    if one["offload"] != "none":
        words.append(f"optimizer in {one['offload']}")
    return ", ".join(words)


def render(plan: Plan) -> Group:
    """The plan as Rich renderables."""
    shape, machine = plan.shape, plan.machine
    head = (
        f"{plan.model}: {_count(parameters(shape))} parameters, {_count(plan.tokens)} tokens, "
        f"{plan.steps:,} steps of {plan.global_batch:,} × {shape.sequence:,} tokens, {plan.precision}, {plan.stack}\n"
        f"{machine.name}: {many(plan.nodes, 'node')}, {many(plan.nodes * machine.node.devices, 'device')} of "
        f"{machine.device.peak[plan.precision] / 1e12:.4g} TFLOP/s and {machine.device.memory / 1e9:.0f} GB\n"
    )
    parts: list[RenderableType] = [Text(head), _choices(plan), _breakdown(plan)]
    parts += [_curve(kind, rows) for kind, rows in plan.curves.items()]
    notes = [*plan.advice, _meanings(plan), _overheads(plan)]
    notes.append(f"Priced {plan.tried:,} layouts in {plan.elapsed:.2f} s.")
    parts.append(Text("\n".join(["", *notes])))
    return Group(*parts)


def text(plan: Plan, width: int = 118) -> str:
    """The plan for a terminal, without colours."""
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(render(plan))
    return str(console.file.getvalue()).rstrip()  # type: ignore[attr-defined]


def _choices(plan: Plan) -> Table:
    """The best layouts, one per line."""
    title = "Best layouts" if plan.fits else "Nothing fits; nearest layouts"
    table = Table(title=title, title_justify="left")
    table.add_column("layout", ratio=1)
    columns = ["s/step", "80% interval", "TFLOP/s", "% peak", "days", "GB/device", "MWh"]
    priced = plan.machine.economy.price is not None
    for column in [*columns, *([plan.machine.economy.currency] if priced else [])]:
        table.add_column(column, justify="right", no_wrap=True)
    for choice in plan.choices:
        table.add_row(
            name(choice),
            three(choice.seconds),
            f"{three(choice.low)}–{three(choice.high)}",
            three(choice.flops / 1e12),
            f"{choice.peak_share:.1%}",
            three(choice.days),
            f"{sum(choice.memory.values()) / 1e9:.1f}",
            "–" if choice.megawatt_hours is None else three(choice.megawatt_hours),
            *([] if choice.cost is None else [f"{choice.cost:,.0f}"]),
        )
    return table


def _breakdown(plan: Plan) -> Table:
    """Where the best layout's seconds and bytes go."""
    best = plan.choices[0]
    table = Table(title="Where the first one's step and memory go", title_justify="left")
    for column, justify in (("seconds", "left"), ("", "right"), ("%", "right"), ("bytes", "left"), ("GB", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    times = [(key, value) for key, value in best.parts.items() if abs(value) > 0.001 * best.seconds]
    sizes = list(best.memory.items())
    for row in range(max(len(times), len(sizes))):
        left = ("", "", "")
        if row < len(times):
            key, value = times[row]
            left = (key, three(value), f"{value / best.seconds:.1%}")
        right = (sizes[row][0], f"{sizes[row][1] / 1e9:.2f}") if row < len(sizes) else ("", "")
        table.add_row(*left, *right)
    return table


def _curve(kind: str, rows: list[dict[str, float]]) -> Table:
    """A sweep over node counts."""
    table = Table(title=f"Scaling ({kind})", title_justify="left")
    for column in ("nodes", "global batch", "s/step", "PFLOP/s", "TFLOP/s per device", "efficiency"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            f"{row['nodes']:,.0f}",
            f"{row['global_batch']:,.0f}",
            three(row["seconds"]),
            f"{row['flops'] / 1e15:.4g}",
            f"{row['flops_per_device'] / 1e12:.3g}",
            f"{row['efficiency']:.0%}",
        )
    return table


MEANINGS = {
    "tensor": "tensor-parallel communication",
    "host": "waiting for the host to issue work",
    "ends": "embedding, output head and loss",
    "bubble": "pipeline stages that idle",
    "pipeline": "messages between stages",
    "data": "gradients and ZeRO's gathers, what does not hide",
    "noise": "waiting for late ranks",
    "working": "buffers of the operation at hand",
    "reserve": "system, libraries, what they keep for themselves",
}
"""What the words of a breakdown mean, where they do not say it themselves."""


def _meanings(plan: Plan) -> str:
    """The words of the breakdown that need one, in the order in which it has them."""
    best = plan.choices[0]
    used = [key for key, value in best.parts.items() if abs(value) > 0.001 * best.seconds] + list(best.memory)
    return "; ".join(f"{key}: {MEANINGS[key]}" for key in used if key in MEANINGS) + "."


def _count(count: float) -> str:
    """A count in three or four digits: `124M`, `26.27B`, `3.492T`."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if count >= size:
            return f"{count / size:.4g}{unit}"
    return f"{count:,.0f}"


def _overheads(plan: Plan) -> str:
    """Conventions and overheads in words."""
    best = plan.choices[0]
    economy = plan.machine.economy
    price = "" if economy.price is None else f"{economy.currency}: {economy.price:g} for a device and hour. "
    return (
        f"Days include {best.losses}. {price}TFLOP/s: model FLOPs per device, recomputation not counted; % of the "
        f"nominal {plan.precision} peak. Interval: from the errors on this machine's calibration rows, or assumed."
    )


def config(plan: Plan) -> str:
    """A config for `tozan train`; what the trainer cannot do yet is said in a comment."""
    best, shape = plan.choices[0], plan.shape
    one = best.layout
    unsaid = f"the optimizer in {one['offload']}" if one["offload"] != "none" else ""
    model = [f"{key} = {_toml(getattr(shape, key))}" for key in _MODEL_KEYS]
    accumulate = plan.global_batch // (one["dp"] * one["micro_batch"])
    lines = [
        f"# {plan.model} on {plan.machine.name}, {many(plan.nodes, 'node')}: {name(best)}",
        f"# predicted: {best.seconds:.3g} s a step ({best.low:.3g} to {best.high:.3g}), {days(best.days)}",
    ]
    if unsaid:
        lines.append(f"# this layout also needs {unsaid}, which the trainer cannot do yet")
    lines += ["version = 1", "", "[run]", f'folder = "runs/{re.sub(r"[^A-Za-z0-9.-]+", "-", plan.model)}"', ""]
    lines += ["[model]", *model, "", "[data]", 'path = "data"', "", "[layout]"]
    lines += [f"{key} = {_toml(value)}" for key, value in _layout_table(one).items()]
    lines += [
        "",
        "[train]",
        f"steps = {plan.steps}",
        f"micro_batch = {one['micro_batch']}",
        f"accumulate = {accumulate}",
    ]
    lines += [f'precision = "{plan.precision}"', f'recompute = "{one["recompute"]}"', "", "[checkpoint]"]
    every = max(1, round(best.losses.interval / best.seconds))
    return "\n".join([*lines, f"every = {every}", ""])


def _layout_table(one: Mapping[str, Any]) -> dict[str, object]:
    """The `[layout]` table of a choice; what is at its default is left out."""
    table: dict[str, object] = {"data": one["dp"], "tensor": one["tp"], "pipeline": one["pp"], "zero": one["zero"]}
    if one["cp"] > 1:
        table["context"] = one["cp"]
    if one["grid"]:
        table |= {"scheme": "2.5d" if one["depth"] > 1 else "2d", "depth": one["depth"]}
    if one["sequence_parallel"]:
        table["sequence_parallel"] = True
    if one["pp"] > 1:
        schedule = "interleaved" if one["chunks"] > 1 else "zero-bubble" if one["zero_bubble"] else "1f1b"
        table |= {"schedule": schedule, "chunks": one["chunks"]}
    return table


_MODEL_KEYS = ("family", "layers", "width", "heads", "kv_heads", "mlp_width", "vocabulary", "sequence", "tied")


def _toml(value: object) -> str:
    """A scalar as TOML."""
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)


def launch(plan: Plan) -> str:
    """A script that has `tozan launch` start `plan.toml`: by PJM on Fugaku, elsewhere by what is there."""
    best = plan.choices[0]
    fewest = -(-best.devices // plan.machine.node.devices)
    nodes = next(count for count in range(fewest, best.devices + 1) if best.devices % count == 0)
    hours = int(min(24, best.days * 24 * best.high / best.seconds) + 1)
    options = f"--nodes {nodes} --minutes {60 * hours}" + " --launcher pjm" * ("Fugaku" in plan.machine.name)
    return f"#!/bin/bash\nexec tozan launch plan.toml {options}\n"
