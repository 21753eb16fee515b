"""Pipeline schedules as plain lists: the trainer executes them, the planner prices them, the report draws them.

A pipeline has `stages` ranks; each holds `chunks` pieces of the model. Piece `chunk` of stage `stage` is the virtual
stage `chunk × stages + stage`, and a micro-batch walks through the virtual stages in order, then back. A schedule says,
for every stage, in which order it runs its actions; *when* follows from the dependencies (`replay`).

Every schedule runs the backward passes of one chunk in the order of the micro-batches, so that gradients are summed
in the same order, and are the same bits, whichever schedule is chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

Kind = Literal["forward", "backward", "backward_input", "backward_weight"]
Name = Literal["gpipe", "1f1b", "interleaved", "zero-bubble"]


class Action(NamedTuple):
    """One thing a stage does.

    `backward` computes the gradients of input and weights at once. Zero-bubble schedules split it: `backward_input`,
    which the previous stage waits for, and `backward_weight`, which nobody waits for and which fills the bubbles.
    """

    kind: Kind
    microbatch: int
    chunk: int = 0


class Step(NamedTuple):
    """An action with the place and time that `replay` found for it; times in the unit of the costs handed in."""

    stage: int
    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Schedule:
    """What every stage does, in order.

    Attributes:
        name: which schedule this is.
        stages: pipeline ranks.
        microbatches: micro-batches of one step.
        chunks: pieces of the model on one stage (1 unless interleaved).
        actions: `actions[stage]` is that stage's list.
    """

    name: Name
    stages: int
    microbatches: int
    chunks: int
    actions: tuple[tuple[Action, ...], ...]

    def waits_for(self, stage: int, action: Action) -> tuple[int, Action] | None:
        """The action of another stage (or chunk) whose result must have arrived before `action` can run.

        `None` if it needs nothing from elsewhere: the first forward, the loss's backward (it needs its own forward,
        which its stage's list puts before it), every `backward_weight`.
        """
        virtual = action.chunk * self.stages + stage
        if action.kind == "backward_weight":
            return None
        before = virtual + (-1 if action.kind == "forward" else 1)
        if not 0 <= before < self.stages * self.chunks:
            return None
        return before % self.stages, Action(action.kind, action.microbatch, before // self.stages)

    def sends_to(self, stage: int, action: Action) -> int | None:
        """The stage that receives what `action` computes (activations forward, gradients backward), or `None`."""
        if action.kind == "backward_weight":
            return None
        virtual = action.chunk * self.stages + stage + (1 if action.kind == "forward" else -1)
        return virtual % self.stages if 0 <= virtual < self.stages * self.chunks else None

    def peak_in_flight(self, stage: int) -> int:
        """The most (micro-batch, chunk) pairs whose activations `stage` holds at once.

        Activations live from the forward to the end of the backward that last needs them: `backward_weight` where the
        backward is split.
        """
        last = "backward_weight" if self.name == "zero-bubble" else "backward"
        held = peak = 0
        for action in self.actions[stage]:
            held += (action.kind == "forward") - (action.kind == last)
            peak = max(peak, held)
        return peak


def gpipe(stages: int, microbatches: int) -> Schedule:
    """All forwards, then all backwards (Huang et al., arXiv 1811.06965).

    Bubble (stages − 1) × (forward + backward); every stage holds all micro-batches.
    """
    _check(stages, microbatches)
    forwards = tuple(Action("forward", m) for m in range(microbatches))
    backwards = tuple(Action("backward", m) for m in range(microbatches))
    return Schedule("gpipe", stages, microbatches, 1, (forwards + backwards,) * stages)


def one_forward_one_backward(stages: int, microbatches: int) -> Schedule:
    """1F1B with flushes (PipeDream-Flush, Narayanan et al., arXiv 2006.09503).

    The bubble of GPipe, but stage s holds at most min(microbatches, stages − s) micro-batches.
    """
    _check(stages, microbatches)
    lists = []
    for stage in range(stages):
        warm_up = min(stages - 1 - stage, microbatches)
        lists.append(_alternate([(m, 0) for m in range(microbatches)], [(m, 0) for m in range(microbatches)], warm_up))
    return Schedule("1f1b", stages, microbatches, 1, tuple(lists))


def interleaved(stages: int, microbatches: int, chunks: int) -> Schedule:
    """Interleaved 1F1B (Narayanan et al., arXiv 2104.04473, section 2.2).

    Micro-batches go through in packs of `stages`, so their number must be a multiple of it. Bubble
    (stages − 1) × (forward + backward) / chunks, where the times are those of all chunks of a stage; the first stage
    holds at most stages × chunks + stages − 1 pairs.

    Raises:
        ValueError: the number of micro-batches is no multiple of the number of stages.
    """
    _check(stages, microbatches, chunks)
    if chunks == 1:
        return one_forward_one_backward(stages, microbatches)
    if microbatches % stages:
        raise ValueError(f"interleaved: {microbatches} micro-batches are not a multiple of {stages} stages")
    total = microbatches * chunks
    order = [(k // (stages * chunks) * stages + k % stages, k % (stages * chunks) // stages) for k in range(total)]
    back = [(microbatch, chunks - 1 - chunk) for microbatch, chunk in order]
    lists = []
    for stage in range(stages):
        warm_up = min(2 * (stages - 1 - stage) + (chunks - 1) * stages, total)
        lists.append(_alternate(order, back, warm_up))
    return Schedule("interleaved", stages, microbatches, chunks, tuple(lists))


def zero_bubble(stages: int, microbatches: int) -> Schedule:
    """ZB-H1 (Qi et al., arXiv 2401.10241): 1F1B with the weight gradients put off into the bubbles.

    Stage s runs its weight gradients s micro-batches late, which holds at most `stages` micro-batches on every stage:
    the peak of 1F1B. Bubble (stages − 1) × (forward + backward_input − backward_weight), a third of 1F1B's where the
    three take equally long.
    """
    _check(stages, microbatches)
    lists = []
    for stage in range(stages):
        warm_up = min(stages - 1 - stage, microbatches)
        actions = [Action("forward", m) for m in range(warm_up)]
        weights = 0
        for m in range(microbatches):
            if warm_up + m < microbatches:
                actions.append(Action("forward", warm_up + m))
            actions.append(Action("backward_input", m))
            if m >= stage:
                actions.append(Action("backward_weight", weights))
                weights += 1
        actions += [Action("backward_weight", m) for m in range(weights, microbatches)]
        lists.append(tuple(actions))
    return Schedule("zero-bubble", stages, microbatches, 1, tuple(lists))


def create(name: Name, stages: int, microbatches: int, chunks: int = 1) -> Schedule:
    """The schedule called `name`.

    Raises:
        ValueError: sizes below 1, chunks other than 1 for a schedule that is not interleaved, or micro-batches that
            the interleaved schedule cannot pack.
    """
    if name == "interleaved":
        return interleaved(stages, microbatches, chunks)
    if chunks != 1:
        raise ValueError(f"{name}: {chunks} chunks per stage; only the interleaved schedule takes more than 1")
    makers = {"gpipe": gpipe, "1f1b": one_forward_one_backward, "zero-bubble": zero_bubble}
    return makers[name](stages, microbatches)


def bubble(
    name: Name, stages: int, chunks: int, forward: float, backward: float, backward_weight: float = 0.0
) -> float:
    """Idle time of the pipeline in one step, by the published formulas (equal stages, free transfers).

    Args:
        name: the schedule.
        stages: pipeline ranks.
        chunks: pieces of the model per stage.
        forward: time of one micro-batch's forward through all chunks of one stage.
        backward: time of its whole backward (input and weights).
        backward_weight: the part of `backward` spent on weight gradients; read by zero-bubble only.
    """
    if name == "zero-bubble":
        return (stages - 1) * max(0.0, forward + backward - 2 * backward_weight)
    return (stages - 1) * (forward + backward) / chunks


def replay(
    schedule: Schedule,
    seconds: Callable[[int, Action], float],
    transfer: Callable[[int, Action], float] = lambda _stage, _action: 0.0,
) -> list[Step]:
    """Run the lists against the clock: every action starts once its stage is free and its input has arrived.

    Args:
        schedule: what each stage does.
        seconds: how long an action takes on a stage.
        transfer: time between the end of the action that `action` waits for and the arrival of its result; not asked
            where both are on the same stage.

    Returns:
        Every action with its start and end, in an order that respects all dependencies.

    Raises:
        ValueError: the lists deadlock: no stage can go on.
    """
    done: dict[tuple[int, Action], float] = {}
    free = [0.0] * schedule.stages
    position = [0] * schedule.stages
    waiting: dict[tuple[int, Action], int] = {}
    runnable = list(range(schedule.stages))
    steps: list[Step] = []
    while runnable:
        stage = runnable.pop()
        actions = schedule.actions[stage]
        while position[stage] < len(actions):
            action = actions[position[stage]]
            need = schedule.waits_for(stage, action)
            if need is not None and need not in done:
                waiting[need] = stage
                break
            arrival = 0.0
            if need is not None:
                arrival = done[need] + (transfer(stage, action) if need[0] != stage else 0.0)
            start = max(free[stage], arrival)
            free[stage] = done[stage, action] = start + seconds(stage, action)
            steps.append(Step(stage, action, start, free[stage]))
            position[stage] += 1
            if (stage, action) in waiting:
                runnable.append(waiting.pop((stage, action)))
    if waiting:
        stuck = ", ".join(f"stage {stage} for {need}" for need, stage in waiting.items())
        raise ValueError(f"schedule {schedule.name} deadlocks: {stuck}")
    return steps


def _alternate(order: list[tuple[int, int]], back: list[tuple[int, int]], warm_up: int) -> tuple[Action, ...]:
    """`warm_up` forwards, then one forward and one backward in turn, then the remaining backwards."""
    actions = [Action("forward", *pair) for pair in order[:warm_up]]
    for k in range(len(order) - warm_up):
        actions += [Action("forward", *order[warm_up + k]), Action("backward", *back[k])]
    actions += [Action("backward", *pair) for pair in back[len(order) - warm_up :]]
    return tuple(actions)


def _check(stages: int, microbatches: int, chunks: int = 1) -> None:
    """Refuse sizes below 1."""
    if min(stages, microbatches, chunks) < 1:
        raise ValueError(f"needs ≥ 1 of each: {stages} stages, {microbatches} micro-batches, {chunks} chunks")
