"""Where the time of a step goes: by phase, measured beside predicted, and by rank and phase."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes

from tozan.amounts import percent, seconds
from tozan.bench.result import Result
from tozan.report.drawing import Figure, figure, rows_csv, table
from tozan.report.history import Array, History
from tozan.report.marks import AMBER, BLUE, GREY, INK, MUTED, RED, Cell, bare, cells, key
from tozan.report.ranks import Ranks, Slow
from tozan.report.words import axis_words, phase_words

MOST_ROWS = 64
"""Rows of the heat map; more ranks share rows."""


def of_bench(result: Result) -> Figure | None:
    """The phases of a measured step beside the least that this machine needs for each (`floor_seconds`)."""
    rows = [row for row in result.rows if row.unit == "s" and not row.get("ranks")]
    if not rows:
        return None
    floors = [float(row.get("floor_seconds") or 0.0) for row in rows]

    def draw(axes: Axes, narrow: bool) -> None:
        for place, (row, floor) in enumerate(zip(rows, floors, strict=True)):
            axes.barh(place - 0.2, row.median, height=0.36, color=BLUE)
            axes.barh(place + 0.2, floor, height=0.36, color=GREY)
            times = f"  ({row.median / floor:.2f} × the floor)" if floor else ""
            _say(axes, row.median, place - 0.2, f"{seconds(row.median)}{times}")
        axes.set_yticks(range(len(rows)), [phase_words(row.name) for row in rows])
        axes.invert_yaxis()
        bare(axes)
        axes.set_xlim(0, max(row.median for row in rows) * (2.0 if narrow else 1.4))
        key(axes, [("measured", BLUE), ("floor: its products and its memory traffic alone", GREY)], narrow)

    said = ", ".join(f"{phase_words(row.name)} {seconds(row.median)}" for row in rows)
    data = rows_csv(
        ("phase", "seconds", "low", "high", "floor_seconds"),
        [(row.name, row.median, row.low, row.high, floor or None) for row, floor in zip(rows, floors, strict=True)],
    )
    return figure("step", "A step and its floor", f"{said}.", draw, data, "", 60.0 + 38.0 * len(rows))


GROUPS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "computing": (
        ("forward", "backward", "communication"),
        ("matrix", "attention", "elementwise", "host", "ends", "forward", "backward"),
    ),
    "optimizer": (("optimizer",), ("optimizer",)),
    "data parallelism": (("wait/dp",), ("data", "dp", "wait/dp")),
    "tensor parallelism": (("wait/tp",), ("tensor", "tp", "wait/tp")),
    "pipeline and bubble": (("wait/pp", "bubble"), ("pipeline", "bubble", "pp", "wait/pp")),
    "the rest": (("data", "other"), ("noise",)),
}
"""What a measured and a predicted step are compared by: phases of the trainer, parts of the planner."""


def phases(history: History, ranks: Ranks | None) -> Figure | None:
    """Mean seconds of each phase of a step with its share.

    Args:
        history: the run's metrics; its phases are rank 0's.
        ranks: all ranks' breakdown, whose means are drawn where there are several.
    """
    found = history.steps["seconds"].size
    total = float(np.nansum(history.steps["seconds"])) / max(1, found)
    means = {name: float(np.nanmean(values)) for name, values in history.phases.items() if np.nansum(values) > 0}
    data = table({"step": history.steps["step"], "seconds": history.steps["seconds"], **history.phases})
    caption = f"Mean of {found:,} steps; a mean step takes {seconds(total)}."
    if ranks is not None and ranks.ranks.size > 1:
        means, total = ranks.means, float(ranks.wall.mean())
        data = rows_csv(("phase", "seconds", "share"), [(name, value, value / total) for name, value in means.items()])
        caption = f"Mean of {ranks.ranks.size:,} ranks, newest {ranks.records:,} steps: {seconds(total)} a step."
    if not means or total <= 0:
        return None

    def draw(axes: Axes, narrow: bool) -> None:
        for place, value in enumerate(means.values()):
            axes.barh(place, value, height=0.62, color=BLUE)
            _say(axes, value, place, f"{seconds(value)}  ({percent(value / total)})")
        axes.set_yticks(range(len(means)), [phase_words(name) for name in means])
        axes.invert_yaxis()
        bare(axes)
        axes.set_xlim(0, max(means.values()) * (1.85 if narrow else 1.32))

    said = ", ".join(f"{phase_words(name)} {percent(value / total)}" for name, value in means.items())
    words = f"Share of the wall time: {said}."
    return figure("phases", "Where a step's time goes", words, draw, data, caption, 40.0 + 27.0 * max(4, len(means)))


def _say(axes: Axes, x: float, y: float, text: str, colour: str = INK) -> None:
    axes.annotate(text, (x, y), xytext=(5, 0), textcoords="offset points", va="center", fontsize=10, color=colour)


def beside(measured: Mapping[str, float], predicted: Mapping[str, float], low: float, high: float) -> Figure | None:
    """A measured step beside the planner's, by what both can be compared by.

    Args:
        measured: seconds by phase, of the trainer.
        predicted: seconds by part, of the planner.
        low: lower end of the interval of the predicted step.
        high: upper end.
    """
    if not measured or not predicted:
        return None
    pairs = {}
    for name, (of_run, of_plan) in GROUPS.items():
        took = sum(value for phase, value in measured.items() if _belongs(phase, of_run))
        foreseen = sum(value for part, value in predicted.items() if part in of_plan)
        if took or foreseen:
            pairs[name] = took, foreseen
    known = {part for _, parts in GROUPS.values() for part in parts}
    if left := sum(value for part, value in predicted.items() if part not in known):
        pairs["not compared"] = 0.0, left
    took, foreseen = (sum(pair[i] for pair in pairs.values()) for i in (0, 1))
    pairs = {"a step": (took, foreseen)} | pairs

    def draw(axes: Axes, narrow: bool) -> None:
        for place, pair in enumerate(pairs.values()):
            for value, shift, colour, ink in zip(pair, (-0.2, 0.2), (BLUE, GREY), (INK, MUTED), strict=True):
                axes.barh(place + shift, value, height=0.36, color=colour)
                _say(axes, max(value, 0.0), place + shift, seconds(value), ink)
        axes.set_yticks(range(len(pairs)), list(pairs))
        axes.invert_yaxis()
        bare(axes)
        axes.set_xlim(0, max(max(pair) for pair in pairs.values()) * (1.5 if narrow else 1.2))
        key(axes, [("measured", BLUE), ("predicted", GREY)], narrow)

    words = (
        f"A step was predicted to take {seconds(foreseen)} ({seconds(low)} to {seconds(high)} in 8 cases of 10) "
        f"and takes {seconds(took)}: {percent(took / foreseen)} of it. "
    )
    words += "; ".join(f"{name}: {seconds(a)} measured, {seconds(b)} predicted" for name, (a, b) in pairs.items()) + "."
    data = rows_csv(("part", "measured_seconds", "predicted_seconds"), [(name, *pair) for name, pair in pairs.items()])
    caption = "Without evaluation and checkpoints. Phases of the run and parts of the plan, by what both have."
    return figure("predicted", "A step, measured and predicted", words, draw, data, caption, 60.0 + 38.0 * len(pairs))


def _belongs(phase: str, group: tuple[str, ...]) -> bool:
    """Whether a phase is of a group; `wait/tp_row` is of `wait/tp`'s, `wait/dp_shards` of `wait/dp`'s."""
    return phase in group or any(name.startswith("wait/") and phase.startswith(f"{name}_") for name in group)


def heat_map(ranks: Ranks | None, slow: list[Slow]) -> Figure | None:
    """Ranks × phases: the darker a cell, the longer a rank spends on a phase; slow ranks are marked.

    Beyond `MOST_ROWS` ranks a row stands for several: its cells show the longest of them.
    """
    if ranks is None or ranks.ranks.size < 2:
        return None
    keep = [i for i, name in enumerate(ranks.phases) if ranks.share(name) >= 0.002]
    names, values = [ranks.phases[i] for i in keep], ranks.seconds[:, keep]
    lines, labels = _gathered(values, ranks.ranks)
    marked = {one.rank for one in slow}
    height = 92.0 + 11.0 * max(8, len(labels))
    top = float(lines.max()) or 1.0

    def draw(axes: Axes, narrow: bool) -> None:
        filled = [
            Cell(column + 0.02, row + 0.04, 0.96, 0.92, BLUE, max(0.03, value / top))
            for row, line in enumerate(lines)
            for column, value in enumerate(line.tolist())
        ]
        cells(axes, filled)
        axes.set_xlim(0, len(names))
        axes.set_ylim(len(labels), 0)
        step = max(1, len(labels) // 16)
        red = {i for i, (_, members) in enumerate(labels) if marked & members}
        shown = sorted(red | {i for i in range(0, len(labels), step) if not red & {i - 1, i + 1}})
        axes.set_yticks([i + 0.5 for i in shown], [labels[i][0] for i in shown], fontsize=9.5)
        for tick, i in zip(axes.get_yticklabels(), shown, strict=True):
            tick.set_color(RED if i in red else MUTED)
        axes.set_xticks([i + 0.5 for i in range(len(names))], [_short(name) for name in names], fontsize=9.5)
        turned = 90 if narrow and len(names) > 10 else 62 if narrow or len(names) > 10 else 28
        axes.tick_params(axis="x", labeltop=True, labelbottom=False, labelrotation=turned, pad=1)
        for label in axes.get_xticklabels():
            label.set_horizontalalignment("left")
            label.set_rotation_mode("anchor")
        axes.grid(False)
        for side in axes.spines.values():
            side.set_visible(False)

    low, high = (float(np.percentile(ranks.work, at)) for at in (0, 100))
    words = (
        f"{ranks.ranks.size:,} ranks by {len(names)} phases. A rank's own work takes from {seconds(low)} to "
        f"{seconds(high)} a step."
    )
    words += f" Slow: {'; '.join(map(str, slow[:3]))}." if slow else " No rank is markedly slower than the others."
    rows = [(int(rank), *line) for rank, line in zip(ranks.ranks.tolist(), ranks.seconds.tolist(), strict=True)]
    caption = f"Darkest: {seconds(top)} a step. Red numbers: slow ranks."
    data = rows_csv(("rank", *ranks.phases), rows)
    return figure("ranks", "Ranks and phases", words, draw, data, caption, height)


def _short(phase: str) -> str:
    return {"communication": "adding up", "wait/dp": "wait dp"}.get(phase, axis_words(phase).replace("wait/", "wait "))


def _gathered(values: Array, ranks: Array) -> tuple[Array, list[tuple[str, set[int]]]]:
    """At most `MOST_ROWS` rows, each the maximum over its ranks, with a label and the ranks of each."""
    pieces = np.array_split(np.arange(len(values)), min(MOST_ROWS, len(values)))
    lines = np.array([values[piece].max(0) for piece in pieces])
    labels = []
    for piece in pieces:
        members = [int(rank) for rank in ranks[piece]]
        labels.append((f"{members[0]}" if len(members) == 1 else f"{members[0]}–{members[-1]}", set(members)))
    return lines, labels


def transfers(ranks: Ranks | None) -> Figure | None:
    """By axis: how long messages were on their way, and how much of it ranks stood waiting."""
    if ranks is None or not ranks.transfer or ranks.ranks.size < 2:
        return None
    axes_of = list(ranks.transfer)
    moved = [float(ranks.transfer[axis].mean()) for axis in axes_of]
    waited = []
    for axis in axes_of:
        names = [f"wait/{axis}", "bubble"] if axis == "pp" else [f"wait/{axis}"]
        waited.append(sum(float(ranks.seconds[:, ranks.phases.index(n)].mean()) for n in names if n in ranks.phases))

    def draw(axes: Axes, narrow: bool) -> None:
        for place, (long, short) in enumerate(zip(moved, waited, strict=True)):
            axes.barh(place - 0.18, long, height=0.32, color=GREY)
            axes.barh(place + 0.18, short, height=0.32, color=AMBER)
            for value, shift in ((long, -0.18), (short, 0.18)):
                axes.annotate(
                    seconds(value), (value, place + shift), xytext=(5, 0), textcoords="offset points", va="center",
                    fontsize=9.5,
                )  # fmt: skip
        axes.set_yticks(range(len(axes_of)), [axis_words(axis) for axis in axes_of])
        axes.invert_yaxis()
        bare(axes)
        axes.set_xlim(0, max(*moved, *waited, 1e-9) * (1.35 if narrow else 1.18))
        key(axes, [("on its way, summed over messages", GREY), ("a rank stood waiting", AMBER)], narrow)

    said = "; ".join(
        f"{axis_words(axis)}: {seconds(long)} on the way, {seconds(short)} waited"
        for axis, long, short in zip(axes_of, moved, waited, strict=True)
    )
    data = rows_csv(("axis", "transfer_seconds", "wait_seconds"), list(zip(axes_of, moved, waited, strict=True)))
    caption = "Mean over ranks. Messages overlap, so their times may sum to more than a step."
    height = 74.0 + 42.0 * len(axes_of)
    return figure("transfers", "Messages by mesh axis", said + ".", draw, data, caption, height)
