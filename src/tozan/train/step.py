"""One optimizer step, top to bottom: batch → forward and backward over micro-batches → norm → clip → AdamW."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tozan.optim.gradients import clip_factor, gradient_norm, scale_gradients
from tozan.optim.schedule import learning_rate
from tozan.train.metrics import Clock
from tozan.train.run import Run

IGNORED = -100
"""A target that is no token to learn (padding, a prompt); it counts neither in the loss nor in the tokens."""


@dataclass(frozen=True)
class StepResult:
    """What one step did.

    Attributes:
        loss: mean over the step's tokens, in nats per token.
        grad_norm: global L2 norm before clipping.
        lr: learning rate used.
        tokens: target tokens of the whole step.
        skipped: why the update was left out, or None.
        overflow: skipped only because the fp16 loss scale was too high, which is no fault of the model's.
    """

    loss: float
    grad_norm: float
    lr: float
    tokens: int
    skipped: str | None = None
    overflow: bool = False


def train_step(run: Run, clock: Clock) -> StepResult:
    """Take optimizer step number `run.step`.

    The loss is summed over tokens and divided once by the tokens of the whole step, so any split into micro-batches
    gives the large batch's gradient. A loss or gradient that is not finite leaves weights and optimizer as they were.
    """
    train, optim = run.config.train, run.config.optim
    batch = torch.from_numpy(run.data.samples(run.samples, run.global_batch))
    tokens = int((batch[:, 1:] != IGNORED).sum())
    clock.mark("data")

    loss = 0.0
    for inputs, targets in micro_batches(run, batch):
        with run.precision.autocast():
            micro_loss = run.model(inputs, targets)
        clock.mark("forward")
        (micro_loss * (run.precision.scale / tokens)).backward()
        loss += micro_loss.item() / tokens
        clock.mark("backward")

    lr = learning_rate(optim, run.step, train.steps)
    norm = gradient_norm(run.parameters, run.precision.scale)
    skipped = norm.culprit if math.isfinite(loss) else f"loss is {loss}"
    overflow = skipped is not None and math.isfinite(loss) and run.precision.can_shrink()
    if skipped is None:
        scale_gradients(run.parameters, clip_factor(norm.value, optim.clip) / run.precision.scale)
        run.optimizer.step(lr)
    run.optimizer.zero_grad()
    run.precision.update(overflow)
    clock.mark("optimizer")
    return StepResult(loss, norm.value, lr, tokens, skipped, overflow)


def micro_batches(run: Run, batch: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut a batch of (B, T+1) token ids into micro-batches of inputs and targets, both (b, T), on the run's device.

    `IGNORED` ids are no targets; as inputs they are read as token 0.

    With dropout, the generator is seeded from the number of each micro-batch's first sample: masks, like samples,
    depend on the seed and the step only.
    """
    for first in range(0, len(batch), run.micro_batch):
        if run.shape.dropout:
            torch.manual_seed(run.config.train.seed * 1_000_003 + run.samples + first)
        piece = batch[first : first + run.micro_batch].to(run.device)
        yield piece[:, :-1].clamp(min=0), piece[:, 1:].contiguous()
