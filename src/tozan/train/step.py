"""One optimizer step, top to bottom: batch → forward and backward over micro-batches → sync → norm → clip → AdamW."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tozan.optim.gradients import clip_factor
from tozan.optim.schedule import learning_rate
from tozan.parallel.data import in_order
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
        again: why nothing was updated and the step must be computed again, or None.
    """

    loss: float
    grad_norm: float
    lr: float
    tokens: int
    skipped: str | None = None
    overflow: bool = False
    again: str | None = None


def train_step(run: Run, clock: Clock) -> StepResult:
    """Take optimizer step number `run.step`.

    The loss is summed over tokens and divided once by the tokens of the whole step, so any split into micro-batches,
    replicas and stages gives the large batch's gradient. A loss or gradient that is not finite leaves weights and
    optimizer as they were.

    Raises:
        SilentError: bits changed in some rank's memory.
    """
    run.checks.begin(run.step)
    sync, optim = run.split.sync, run.config.optim
    batches, tokens = own_micro_batches(run)
    clock.mark("data")

    losses = run_pipeline(run, batches, tokens, clock) if run.split.stage else []
    for number, (inputs, targets) in enumerate(batches if not run.split.stage else ()):
        seed_dropout(run, number)
        sync.begin(last=number == len(batches) - 1)
        with run.precision.autocast():
            micro_loss = run.split.model(inputs, targets)
        clock.mark("forward")
        (micro_loss * (run.precision.scale / tokens)).backward()
        losses.append(micro_loss.item())
        clock.mark("backward")
    sync.finish()
    if not run.split.alone:
        clock.mark("communication")

    loss = sum(in_order(losses, run.split.replicas)) / tokens
    lr = learning_rate(optim, run.step, run.config.train.steps)
    norm = run.split.gradient_norm(run.precision.scale)
    skipped = norm.culprit if math.isfinite(loss) else f"loss is {loss}"
    overflow = skipped is not None and math.isfinite(loss) and run.precision.can_shrink()
    clock.mark("optimizer")
    again = run.checks.judge(run.step, loss, norm.value, losses, overflow=overflow)
    clock.mark("checks")
    if again is not None:
        run.optimizer.zero_grad()
        return StepResult(loss, norm.value, lr, tokens, again=again)
    written: dict[str, int] = {}
    if skipped is None:
        written = run.optimizer.step(lr, clip_factor(norm.value, optim.clip) / run.precision.scale)
    run.optimizer.zero_grad()
    if skipped is None:
        sync.publish()
    run.precision.update(overflow)
    clock.mark("optimizer")
    run.checks.keep(run.step + 1, written)
    clock.mark("checks")
    return StepResult(loss, norm.value, lr, tokens, skipped, overflow)


def own_micro_batches(run: Run) -> tuple[list[tuple[Tensor, Tensor]], int]:
    """This replica's micro-batches of the step, and the target tokens of the whole step.

    Micro-batch number j·n + r of the step is the j-th of replica r of n, so a step's samples are the same in every
    layout. With context parallelism they are this rank's tokens of these samples. `IGNORED` ids are no targets; as
    inputs they are read as token 0.

    Returns:
        (inputs, targets), both (b, T) on the run's device, for each micro-batch.
    """
    batches, tokens = [], 0
    for number in range(run.accumulate):
        samples = torch.from_numpy(run.data.samples(first_sample(run, number), run.micro_batch)).to(run.device)
        inputs, targets = samples[:, :-1].clamp(min=0), samples[:, 1:].contiguous()
        batches.append((run.split.own_tokens(inputs), run.split.own_tokens(targets)))
        tokens += int((batches[-1][1] != IGNORED).sum())
    return batches, int(sum(in_order([float(tokens)], run.split.replicas, name="tokens")))


def first_sample(run: Run, number: int) -> int:
    """Number of the first sample of this replica's micro-batch `number` of the step."""
    replicas = run.split.mesh["dp"]
    return run.samples + (number * replicas.size + replicas.index) * run.micro_batch


def seed_dropout(run: Run, number: int) -> None:
    """Make the dropout masks of a micro-batch depend on the seed and its samples only."""
    if run.shape.dropout:
        # `torch.manual_seed` also notes a stack trace for every kind of device that is not there: 100 times slower.
        seed = torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed
        seed(run.config.train.seed * 1_000_003 + first_sample(run, number))


def run_pipeline(run: Run, batches: list[tuple[Tensor, Tensor]], tokens: int, clock: Clock) -> list[float]:
    """The same through the stages of a pipeline, whose engine knows what it spent on which pass."""
    assert run.split.stage is not None
    inputs, targets = zip(*batches, strict=True)
    outcome = run.split.stage.step(inputs, targets, run.precision.scale / tokens)
    clock.mark("other")
    clock.move("other", "forward", outcome.forward)
    clock.move("other", "backward", outcome.backward)
    clock.move("wait/pp", "bubble", outcome.waited)
    if run.split.stage.hand_over is None:
        run.split.sync.begin(last=True)
    return [float(loss) for loss in outcome.losses.tolist()]
