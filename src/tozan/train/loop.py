"""The loop over steps: train, write metrics, evaluate, save, stop when asked."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path

from tozan.checkpoint import Saver
from tozan.comm import collectives
from tozan.errors import say
from tozan.models.arithmetic import model_flops
from tozan.train import machine
from tozan.train.breakdown import Breakdown
from tozan.train.checks import REGULAR, SilentError
from tozan.train.clock import Clock
from tozan.train.crew import Crew
from tozan.train.deadline import Deadline
from tozan.train.evaluate import held_out
from tozan.train.faults import BadSteps, Interrupted, StopSignal
from tozan.train.metrics import Metrics
from tozan.train.profile import Profiler
from tozan.train.run import Listener, Run, resume
from tozan.train.split import executed_flops
from tozan.train.step import StepResult, train_step

BETWEEN = ("evaluation", "checkpoint", "copy")
"""Phases that lie between two steps and are no part of what one costs."""
RETURNS = 5
"""Times that a run goes back to the same step before a machine that keeps making errors ends it."""


@dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
        folder: the run's folder.
        step: optimizer steps done.
        loss: training loss of the last step, in nats per token (None if nothing was left to do).
        held_out: the last evaluation's record, or None without a held-out split.
    """

    folder: Path
    step: int
    loss: float | None
    held_out: dict[str, float | int] | None


def fit(run: Run, on_record: Listener | None = None, deadline: Deadline | None = None) -> Result:
    """Train from `run.step` to the last step.

    Args:
        run: what is trained.
        on_record: called with each metrics record.
        deadline: watches over this thread, or nobody does.

    Raises:
        Interrupted: SIGINT or SIGTERM came; the state of the last whole step is saved.
        UserError: too many steps in a row were not finite; a file could not be written.
        SilentError: bits changed in a rank's memory, and there is no going back.
    """
    config = run.config
    metrics = Metrics.open(run.folder, config, on_record) if run.writes else Metrics([])
    breakdown = Breakdown(run.folder, run.split.mesh.rank, run.split.mesh.ledger, run.split.stage)
    deadline = deadline or Deadline.of(config, run.split.mesh)
    result = None
    try:
        with (
            open_saver(run) as saver,
            StopSignal(run.split.mesh, run.config.recovery.warning) as stop,
            open_profiler(run) as profiler,
            deadline.ends(),
        ):
            score = before_steps(run, metrics, deadline)
            if run.copies.leave:
                stop.received = signal.SIGTERM
            bad, clock = BadSteps(config.train.max_bad_steps), Clock(run.device, run.split.mesh.ledger)
            while run.step < config.train.steps and not stop.agreed():
                deadline.begin(run.step + 1, clock)
                profiler.begin(run.step + 1)
                run.copies.begin(run.step + 1)
                breakdown.begin(run.step + 1, clock)
                try:
                    result = train_step(run, clock)
                    tell(run, result, metrics)
                    if result.again is not None:
                        continue
                    advance(run, result)
                    profiler.end(run.step)
                    breakdown.end(run.step, clock)
                    report(run, result, metrics, clock, breakdown)
                    bad.record(run.step, None if result.overflow else result.skipped)
                    score = between_steps(run, saver, metrics, clock, deadline) or score
                except SilentError as error:
                    with deadline.during("going back"):
                        roll_back(run, saver, metrics, error)
            if stop.received and run.step < config.train.steps:
                with deadline.during("checkpoint"):
                    leave(run, saver, metrics, stop.received)
    finally:
        metrics.close()
        breakdown.close()
        write_ledger(run)
    return Result(run.folder, run.step, result.loss if result else None, score)


def before_steps(run: Run, metrics: Metrics, deadline: Deadline) -> dict[str, float | int] | None:
    """What is due before a process's first step: notes of its start, the score of fresh weights, the copy in memory."""
    for event, text in run.notes:
        metrics.write("event", run.step, event=event, text=text)
    score = None
    if run.step == 0 and run.config.eval.every:
        with deadline.during("evaluation"):
            score = evaluate(run, metrics)
    run.copies.keep(run)
    return score


def between_steps(
    run: Run, saver: Saver, metrics: Metrics, clock: Clock, deadline: Deadline
) -> dict[str, float | int] | None:
    """What is due after a step: an evaluation, whose score is returned, a checkpoint, the copy in memory.

    Raises:
        SilentError: bits of the state changed in memory since the last update.
    """
    config, score = run.config, None
    last = run.step == config.train.steps
    if due(run.step, config.eval.every) or last:
        with deadline.during("evaluation"):
            score = evaluate(run, metrics)
        clock.mark("evaluation")
    if due(run.step, config.checkpoint.every) or last:
        with deadline.during("checkpoint"):
            save(run, saver, metrics)
        clock.mark("checkpoint")
    if not last:  # the last step counts as done when its checkpoint is on the disk
        run.copies.keep(run)
        clock.mark("copy")
    return score


def tell(run: Run, result: StepResult, metrics: Metrics) -> None:
    """Write down what the checks of a step have found; rank 0 says it on standard error, too."""
    for event, text in run.checks.take_events():
        metrics.write("event", run.step, event=event, text=text)
        if run.writes:
            say(f"{event}: {text}")
    if result.again is not None and result.again != REGULAR:
        metrics.write("event", run.step, event="computed again", text=result.again)


def roll_back(run: Run, saver: Saver, metrics: Metrics, error: SilentError) -> None:
    """Answer an error in memory: continue from the copies in memory or the newest good checkpoint, or end the run.

    Raises:
        SilentError: the config says `stop`, there is nothing to go back to, or it was gone back to `RETURNS` times.
    """
    run.optimizer.zero_grad()
    metrics.write("event", run.step, event="silent error", text=str(error))
    if run.writes:
        say(str(error))
    if run.config.checks.on_error == "stop":
        raise error
    run.notes.clear()
    if run.copies.roll_back(run):
        run.notes.append(("resumed", f"continues from the copies of step {run.step} in memory"))
    else:
        saver.wait()
        collectives.barrier(run.split.mesh.everyone, name="rollback")
        resume(run)
    before, times = run.returns
    run.returns = run.step, times + 1 if before == run.step else 1
    if run.returns[1] > RETURNS or not any(event == "resumed" for event, _ in run.notes):
        raise error
    for event, text in run.notes:
        metrics.write("event", run.step, event=event, text=text)


def open_saver(run: Run) -> Saver:
    """The writer of checkpoints, on every rank of its part."""
    table = run.config.checkpoint
    return Saver(
        run.checkpoints,
        keep_last=table.keep_last,
        keep_every=table.keep_every,
        background=table.background,
        crew=Crew.of(run.split.mesh),
    )


def open_profiler(run: Run) -> Profiler:
    """Rank 0's tracer, if a trace is asked for."""
    return Profiler(run.config.metrics.profile if run.writes else (), run.folder / "trace.json")


def save(run: Run, saver: Saver, metrics: Metrics) -> None:
    """Save the run's state: every rank writes its part.

    Raises:
        SilentError: bits of it changed in memory since the last update; nothing is saved.
    """
    run.checks.confirm(run.step)
    saver.save(run.state())
    metrics.write("event", run.step, event="checkpoint", text=f"step {run.step}")


def leave(run: Run, saver: Saver, metrics: Metrics, received: signal.Signals) -> None:
    """Save and stop; all ranks together, since launchers kill those that are still saving when the first has left.

    Raises:
        Interrupted: always.
    """
    if saver.begun != run.step:  # due or not: a state from memory may be one whose checkpoint was never finished
        save(run, saver, metrics)
    metrics.write("event", run.step, event="stopped", text=received.name)
    saver.wait()
    collectives.barrier(run.split.mesh.everyone, name="saved")
    raise Interrupted(received, run.step)


def write_ledger(run: Run) -> None:
    """Leave what this rank has said to whom in the run's folder; alone there is nothing to tell."""
    if not run.split.alone:
        folder, rank = run.folder / "ledger", run.split.mesh.rank
        folder.mkdir(exist_ok=True)
        run.split.mesh.ledger.write(folder / f"rank-{rank:06d}.jsonl", rank)


def due(step: int, every: int) -> bool:
    """Whether something that happens every `every` steps (0: never) happens after `step` steps."""
    return every > 0 and step % every == 0


def advance(run: Run, result: StepResult) -> None:
    """Count a step as done; a skipped one too, since its samples are used up."""
    run.step += 1
    run.samples += run.global_batch
    run.tokens += result.tokens


def report(run: Run, result: StepResult, metrics: Metrics, clock: Clock, breakdown: Breakdown) -> None:
    """Write the step's record, and this rank's part of the breakdown.

    `seconds` and `phases` run from the previous record to this one, so they hold the evaluation, the checkpoint and
    the copy of the state between the two; rates leave those out.
    """
    clock.tokens += result.tokens
    if result.skipped is not None:
        metrics.write("event", run.step, event="skipped step", text=result.skipped)
    if run.step % run.config.metrics.every and run.step != run.config.train.steps:
        return
    tokens = clock.tokens
    seconds, phases = clock.lap()
    breakdown.write(run.step, seconds, phases)
    working = seconds - sum(phases.get(name, 0.0) for name in BETWEEN)
    rate = tokens / working
    achieved = rate * model_flops(run.shape) / run.shape.sequence
    executed = rate * executed_flops(run.config, run.shape) / run.shape.sequence
    metrics.write(
        "step",
        run.step,
        tokens=run.tokens,
        samples=run.samples,
        loss=result.loss,
        grad_norm=result.grad_norm,
        lr=result.lr,
        seconds=seconds,
        tokens_per_second=rate,
        model_flops_per_second=achieved,
        mfu=achieved / run.peak_flops,
        hfu=executed / run.peak_flops,
        phases=phases,
        skipped=result.skipped,
        skipped_samples=run.data.skipped,
        loss_scale=run.precision.scale,
        **machine.gpu_memory(run.device),
    )


def evaluate(run: Run, metrics: Metrics) -> dict[str, float | int] | None:
    """Write and return the held-out score; None without a held-out split."""
    if run.validation is None:
        return None
    model = run.split.model
    model.eval()
    score = held_out(
        run.split.score,
        run.validation,
        run.config.eval.samples,
        run.micro_batch,
        run.precision,
        whole=run.config.layout.scheme != "1d",
        replicas=run.split.mesh["dp"],
    )
    model.train()
    metrics.write("eval", run.step, **score)
    return score
