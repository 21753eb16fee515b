"""The timeline of a pipeline: what every stage does when, as measured and as planned."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes

from tozan.amounts import percent, seconds
from tozan.report.drawing import Figure, figure, rows_csv
from tozan.report.history import History
from tozan.report.marks import BLUE, MUTED, TEAL, VIOLET, key
from tozan.report.ranks import Timeline
from tozan.report.words import time_tick
from tozan.schedules import Action, Schedule, Step, create, replay

COLOURS = {"forward": BLUE, "backward": TEAL, "backward_input": TEAL, "backward_weight": VIOLET}
WORDS = {
    "forward": "forward",
    "backward": "backward",
    "backward_input": "backward, input",
    "backward_weight": "backward, weights",
}
MOST_STAGES = 16
MOST_ACTIONS = 1_200


def measured_steps(found: Timeline, schedule: Schedule) -> list[Step]:
    """The actions of the first replica's stages, in seconds from the first of them."""
    steps: list[Step] = []
    seen: set[int] = set()
    for rank in sorted(found.ranks):
        one = found.ranks[rank]
        if "actions" not in one or one["stage"] in seen or not 0 <= one["stage"] < schedule.stages:
            continue
        seen.add(one["stage"])
        shift = found.offset[rank]
        steps += [
            Step(one["stage"], Action(kind, microbatch, chunk), start + shift, end + shift)
            for kind, microbatch, chunk, start, end in one["actions"]
        ]
    first = min((step.start for step in steps), default=0.0)
    return [step._replace(start=step.start - first, end=step.end - first) for step in steps]


def planned_steps(steps: Iterable[Step], schedule: Schedule) -> list[Step]:
    """The schedule replayed with each stage's measured mean time per kind of action, messages taking no time."""
    took: dict[tuple[int, str, int], list[float]] = {}
    for step in steps:
        took.setdefault((step.stage, step.action.kind, step.action.chunk), []).append(step.end - step.start)
    means = {name: fmean(times) for name, times in took.items()}
    return replay(schedule, lambda stage, action: means.get((stage, action.kind, action.chunk), 0.0))


def schedule_of(config: dict[str, Any], facts: dict[str, Any]) -> Schedule | None:
    """The schedule of a run's config; None where it has no pipeline."""
    table = facts.get("layout") or config.get("layout") or {}
    stages = int(table.get("pipeline", 1))
    if stages == 1:
        return None
    accumulate = config.get("train", {}).get("accumulate") or 1
    try:
        return create(table.get("schedule", "1f1b"), stages, int(accumulate), int(table.get("chunks", 1)))
    except (ValueError, KeyError):
        return None


def of_run(history: History, found: Timeline | None) -> Figure | None:
    """The measured step of a run above the planned one."""
    schedule = schedule_of(history.config, history.facts)
    if schedule is None or found is None:
        return None
    steps = measured_steps(found, schedule)
    if {step.stage for step in steps} != set(range(schedule.stages)):
        return None
    plan = planned_steps(steps, schedule)
    lanes = [("measured", steps), ("planned", plan)]
    long, short = max(step.end for step in steps), max(step.end for step in plan)
    words = (
        f"{schedule.name}, {schedule.stages} stages, {schedule.microbatches} micro-batches. Measured in step "
        f"{found.step}: {seconds(long)}, idle {percent(idle(steps, schedule.stages))}. The same actions, each taking "
        f"its stage's mean time and messages taking none: {seconds(short)}, idle "
        f"{percent(idle(plan, schedule.stages))}."
    )
    return _figure("pipeline", "The pipeline, measured and planned", words, lanes, schedule.stages)


def of_plan(name: str, stages: int, microbatches: int, steps: list[Step]) -> Figure:
    """The planned step of a layout.

    Args:
        name: of its schedule.
        stages: pipeline stages.
        microbatches: of one step.
        steps: its actions with their times.
    """
    words = (
        f"{name}, {stages} stages, {microbatches} micro-batches: {seconds(max(step.end for step in steps))}, idle "
        f"{percent(idle(steps, stages))}."
    )
    return _figure("pipeline", "The pipeline's timeline, planned", words, [("planned", steps)], stages)


def idle(steps: list[Step], stages: int) -> float:
    """Share of all stages' time in which they compute nothing."""
    end = max(step.end for step in steps)
    return 1.0 - sum(step.end - step.start for step in steps) / (stages * end) if end else 0.0


def _figure(name: str, title: str, words: str, lanes: list[tuple[str, list[Step]]], stages: int) -> Figure:
    rows = min(stages, MOST_STAGES)
    end = max(step.end for _, steps in lanes for step in steps)
    kinds = [kind for kind in COLOURS if any(step.action.kind == kind for step in lanes[0][1])]

    def draw(axes: Axes, narrow: bool) -> None:
        ticks = []
        for lane, (label, steps) in enumerate(lanes):
            top = lane * (rows + 1.1)
            axes.annotate(label, (0, top - 0.12), fontsize=9.5, color=MUTED, va="bottom")
            ticks += [(top + stage + 0.5, str(stage)) for stage in range(rows) if rows <= 8 or stage % 2 == 0]
            _bars(axes, steps, top, rows, end)
        axes.set_yticks([place for place, _ in ticks], [text for _, text in ticks], fontsize=9.5)
        axes.set_ylim(len(lanes) * (rows + 1.1) - 0.8, -0.75)
        axes.set_xlim(0, end * 1.01)
        axes.grid(False)
        axes.spines["bottom"].set_visible(True)
        axes.xaxis.set_major_formatter(time_tick)
        axes.locator_params(axis="x", nbins=3 if narrow else 6)
        key(axes, [(WORDS[kind], COLOURS[kind]) for kind in kinds], narrow, -0.24 if len(lanes) * rows < 8 else -0.14)

    data = rows_csv(
        ("timeline", "stage", "kind", "microbatch", "chunk", "start_seconds", "end_seconds"),
        [(label, step.stage, *step.action, step.start, step.end) for label, steps in lanes for step in steps],
    )
    caption = "A row is a stage. Lighter: even micro-batches. White: idle."
    if stages > rows:
        caption += f" The first {rows} of {stages} stages."
    height = 96.0 + len(lanes) * (rows + 1.1) * (20.0 if rows <= 8 else 13.0)
    return figure(name, title, words, draw, data, caption, height)


def _bars(axes: Axes, steps: list[Step], top: float, rows: int, end: float) -> None:
    """One lane; actions beyond what an eye can tell apart are left out at the end."""
    drawn = sorted((step for step in steps if step.stage < rows), key=lambda step: step.start)[:MOST_ACTIONS]
    for kind, colour in COLOURS.items():
        for odd in (0, 1):
            for stage in range(rows):
                spans = [
                    (step.start, max(step.end - step.start - 0.001 * end, 0.0004 * end))
                    for step in drawn
                    if step.stage == stage and step.action.kind == kind and step.action.microbatch % 2 == odd
                ]
                if spans:
                    alpha = 1.0 if odd else 0.62
                    axes.broken_barh(spans, (top + stage + 0.08, 0.84), facecolor=colour, linewidth=0, alpha=alpha)
