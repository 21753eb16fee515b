"""One optimizer step, top to bottom: batch → forward and backward over micro-batches → sync → norm → clip → AdamW."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tozan.optim.gradients import clip_factor
from tozan.optim.schedule import learning_rate
from tozan.parallel.data import in_order
from tozan.train.clock import Clock
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
    batches, tokens = run.ahead.pop(run.samples) if run.samples in run.ahead else own_micro_batches(run, run.samples)
    clock.mark("data")

    summed = [run_pipeline(run, batches, tokens, clock)] if run.split.stage else []
    for number, (inputs, targets) in enumerate(batches if not run.split.stage else ()):
        seed_dropout(run, number)
        sync.begin(last=number == len(batches) - 1)
        with run.precision.autocast():
            micro_loss = run.split.model(inputs, targets)
        clock.mark("forward")
        (micro_loss * (run.precision.scale / tokens)).backward()
        summed.append(micro_loss.detach().view(1))
        clock.mark("backward")
    read_ahead(run)
    sync.finish()
    if not run.split.alone:
        clock.mark("communication")

    run.checks.look()
    norm = run.split.gradient_norm(run.precision.scale)
    losses = torch.cat(summed).tolist()  # a GPU is waited for once, with all its work before it
    loss = sum(in_order(losses, run.split.replicas)) / tokens
    lr = learning_rate(optim, run.step, run.config.train.steps)
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


def read_ahead(run: Run) -> None:
    """On a GPU, which still works at the backward pass: read the next step's micro-batches."""
    following = run.samples + run.global_batch
    if run.device.type == "cuda" and following not in run.ahead:
        run.ahead = {following: own_micro_batches(run, following)}


def own_micro_batches(run: Run, first: int) -> tuple[list[tuple[Tensor, Tensor]], int]:
    """This replica's micro-batches of the step whose first sample is number `first`, and its target tokens.

    Micro-batch number j·n + r of the step is the j-th of replica r of n, so a step's samples are the same in every
    layout. With context parallelism they are this rank's tokens of these samples. `IGNORED` ids are no targets; as
    inputs they are read as token 0.

    Returns:
        (inputs, targets), both (b, T) on the run's device, for each micro-batch.
    """
    batches, tokens = [], 0
    for number in range(run.accumulate):
        samples = torch.from_numpy(run.data.samples(first + offset(run, number), run.micro_batch))
        inputs, targets = run.split.own_tokens(samples[:, :-1]), run.split.own_tokens(samples[:, 1:])
        batches.append((to_device(inputs.clamp(min=0), run.device), to_device(targets.contiguous(), run.device)))
        tokens += int((targets != IGNORED).sum())
    return batches, int(sum(in_order([float(tokens)], run.split.replicas, name="tokens")))


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host's on a device; a GPU that still works at something else is not waited for."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def offset(run: Run, number: int) -> int:
    """Samples of a step before this replica's micro-batch `number`."""
    replicas = run.split.mesh["dp"]
    return (number * replicas.size + replicas.index) * run.micro_batch


def seed_dropout(run: Run, number: int) -> None:
    """Make the dropout masks of a micro-batch depend on the seed and its samples only."""
    if run.shape.dropout:
        # `torch.manual_seed` also notes a stack trace for every kind of device that is not there: 100 times slower.
        seed = torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed
        seed(run.config.train.seed * 1_000_003 + run.samples + offset(run, number))


def run_pipeline(run: Run, batches: list[tuple[Tensor, Tensor]], tokens: int, clock: Clock) -> Tensor:
    """The same through the stages of a pipeline, whose engine knows what it spent on which pass; returns the losses."""
    assert run.split.stage is not None
    inputs, targets = zip(*batches, strict=True)
    outcome = run.split.stage.step(inputs, targets, run.precision.scale / tokens)
    clock.mark("other")
    clock.move("other", "forward", outcome.forward)
    clock.move("other", "backward", outcome.backward)
    clock.move("wait/pp", "bubble", outcome.waited)
    if run.split.stage.hand_over is None:
        run.split.sync.begin(last=True)
    return outcome.losses
