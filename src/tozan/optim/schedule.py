"""The learning rate as a function of the step; torch-free."""

from __future__ import annotations

import math
from typing import Literal, Protocol


class ScheduleTable(Protocol):
    """What `learning_rate` reads: the `[optim]` table of a config."""

    lr: float
    min_lr: float
    schedule: Literal["cosine", "linear", "wsd", "constant"]
    warmup: int
    decay: int | None


def learning_rate(table: ScheduleTable, step: int, steps: int) -> float:
    """Learning rate of one optimizer step.

    Warm-up rises linearly and reaches `lr` with its last step; the run's last step has `min_lr` for every schedule but
    `constant`. `wsd` is warm-up, stable, decay (MiniCPM, arXiv 2404.06395): the last `decay` steps fall linearly.

    Args:
        table: the `[optim]` table.
        step: number of steps already done, 0 ≤ step < steps.
        steps: steps in the whole run.
    """
    if step < table.warmup:
        return table.lr * (step + 1) / table.warmup
    if table.schedule == "constant":
        return table.lr
    start = table.warmup
    if table.schedule == "wsd":
        start = max(start, steps - 1 - (table.decay or max(1, steps // 5)))
    if step < start:
        return table.lr
    progress = (step - start) / max(1, steps - 1 - start)
    share = 0.5 * (1.0 + math.cos(math.pi * progress)) if table.schedule == "cosine" else 1.0 - progress
    return table.min_lr + (table.lr - table.min_lr) * share
