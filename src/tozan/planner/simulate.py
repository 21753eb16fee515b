"""One layout's pipeline against the clock: the schedule that the trainer would run, with the planner's costs.

The search prices pipelines by closed forms; this replays the action lists themselves, with uneven stages as
`layout.split_layers` cuts them, and gives every action a start and an end, for drawing and for checking the forms.
"""

from __future__ import annotations

import numpy as np

from tozan.layout import split_layers
from tozan.planner import costs
from tozan.planner.candidates import Candidates
from tozan.planner.layer import Job
from tozan.schedules import Action, Name, Schedule, Step, create, replay


def schedule_of(job: Job, c: Candidates, index: int = 0) -> Schedule:
    """The schedule that a candidate runs.

    Raises:
        ValueError: micro-batches that the interleaved schedule cannot pack.
    """
    one = c.one(index)
    name: Name = "zero-bubble" if one["zero_bubble"] else "interleaved" if one["chunks"] > 1 else "1f1b"
    microbatches = job.global_batch // (one["dp"] * one["micro_batch"])
    return create(name, one["pp"], microbatches, one["chunks"])


def timeline(job: Job, c: Candidates, index: int = 0) -> list[Step]:
    """Every action of one step's pipeline with its seconds; communication over replicas and optimizer come after it.

    The output head runs in the last virtual stage, forward and backward in equal parts, the embedding in the first.
    """
    picked = c.pick([index])
    schedule, stage = schedule_of(job, c, index), costs.stages(job, picked)
    layers = float(np.broadcast_to(costs.layers_of(job.shape, picked), 1)[0])
    forward, backward, weights, head, table = (
        float(np.broadcast_to(value, 1)[0])
        for value in (stage.forward, stage.backward, stage.weights, stage.head, stage.embedding)
    )
    message = float(np.broadcast_to(costs.message(job, picked), 1)[0]) * (1 - job.stack.pp_overlap)
    pieces = split_layers(job.shape.layers, schedule.stages, schedule.chunks)
    per_layer = {
        "forward": forward / layers,
        "backward": backward / layers,
        "backward_input": (backward - weights) / layers,
        "backward_weight": weights / layers,
    }

    def seconds(place: int, action: Action) -> float:
        blocks = len(pieces[place][action.chunk]) * per_layer[action.kind]
        virtual = action.chunk * schedule.stages + place
        ends = table * (virtual == 0) + head * (virtual == schedule.stages * schedule.chunks - 1)
        # Sending occupies the stage: its neighbours cannot both compute and copy at full speed.
        sends = message if schedule.sends_to(place, action) not in (None, place) else 0.0
        return blocks + sends + (0.0 if action.kind == "backward_weight" else ends / 2)

    return replay(schedule, seconds)
