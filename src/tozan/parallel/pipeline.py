"""Pipeline parallelism: a rank keeps some of the blocks and runs its list of a schedule.

The lists come from `schedules.py`; the planner prices the same ones. Every forward sends its activations on, every
backward its input's gradient back, while the next action runs. Each product is the single process's, on the same
operands, and every schedule adds gradients up in the order of the micro-batches, so losses and gradients are the
single process's to the bit.

With data parallelism beside it, `Pipeline.hand_over` passes each micro-batch's gradients of a piece of the model on as
soon as they are complete, in the order of the micro-batches, and the sum over replicas is the single process's, too.

A tied embedding is on the first stage and on the last; its gradient is made as one process would (`tied.py`).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tozan.comm import Axis, collectives
from tozan.comm.ledger import Total
from tozan.ops.compiler import beginning
from tozan.parallel.mail import Mail
from tozan.parallel.placement import Placement
from tozan.parallel.synchronizer import Relay
from tozan.parallel.tied import TiedEmbedding, frozen, relay
from tozan.parallel.weight_gradients import WeightGradients
from tozan.schedules import Action, Schedule, Step

Layers = tuple[tuple[range, ...], ...]
"""Block numbers: `layers[stage][chunk]`, as `layout.split_layers` gives them, or any other contiguous split."""
HandOver = Callable[[Collection[str], bool], None]
"""Takes the gradients of these parameters, whether they are the step's last: `DataParallel.hand_over` and `Zero`'s."""
LocalShape = Callable[[int, int], tuple[int, ...]]
"""Shape of this rank's part of the residual stream for B samples of T tokens: `Scheme.local_shape`, the width given."""


@dataclass(frozen=True)
class Outcome:
    """What one step's pipeline did.

    Attributes:
        losses: summed loss of every micro-batch, (M,), in order; the same on every stage.
        steps: this stage's actions with their times, in seconds from the beginning of the step.
        busy: seconds in which this stage computed.
        idle: seconds in which it waited for others, to the moment when the last stage was done.
        begin: when the step began, in seconds of `time.perf_counter`.
        forward: seconds in forward passes, waits for other axes left out.
        backward: seconds in backward passes, the same.
        waited: seconds waited for other stages, by the ledger: `idle` without the bookkeeping.
    """

    losses: Tensor
    steps: list[Step]
    busy: float
    idle: float
    begin: float
    forward: float
    backward: float
    waited: float


@dataclass(frozen=True)
class Part:
    """What a stage keeps of a model.

    Attributes:
        layers: blocks of all stages.
        stage: this one.
        tied: whether the output head is the embedding.
    """

    layers: Layers
    stage: int
    tied: bool


def cut(model: nn.Module, layers: Layers, stage: int) -> Part:
    """Keep one stage's part of a model, in place; names stay.

    The model has `embed_tokens` (first stage), `blocks`, and `output` with `norm`, and `head` or the tied `embed`
    (last stage). Everything else that has parameters belongs to the first.

    Args:
        model: whole, on any device.
        layers: blocks of all stages.
        stage: which to keep.

    Returns:
        What the pipeline has to know about the cut.

    Raises:
        ValueError: the split leaves blocks out, or has an empty piece.
    """
    order = [number for chunk in zip(*layers, strict=True) for piece in chunk for number in piece]
    blocks = model.blocks
    assert isinstance(blocks, nn.ModuleList)
    if order != list(range(len(blocks))) or not all(piece for pieces in layers for piece in pieces):
        raise ValueError(f"split {layers} of {len(blocks)} blocks: every piece needs blocks, and all must be in order")
    kept = nn.ModuleList()
    for piece in layers[stage]:
        for number in piece:
            kept.add_module(str(number), blocks[number])
    model.blocks = kept
    last, tied = stage == len(layers) - 1, getattr(model, "head", None) is None
    output = {"norm", "embed"} if tied else {"norm", "head"}
    for name, child in list(model.named_children()):
        needed = name == "blocks" or (stage == 0 and name not in ("norm", "head")) or (last and name in output)
        if not needed and any(True for _ in child.parameters()):
            setattr(model, name, None)
    return Part(layers, stage, tied)


class Pipeline:
    """One stage, ready to run its list of the schedule.

    Args:
        model: after `cut` (and `apply`, and recomputation).
        part: what `cut` returned.
        axis: the mesh's `pp`.
        schedule: what every stage does.
        local_shape: of the activations that stages hand on.
        autocast: opens the context that forward passes run in.

    Attributes:
        outcome: what the last step did.
        hand_over: takes the gradients of every micro-batch; None adds them up in the parameters' `.grad`.

    Raises:
        ValueError: schedule, layers and axis are not of the same number of stages and chunks.
    """

    outcome: Outcome | None = None

    def __init__(
        self,
        model: nn.Module,
        part: Part,
        axis: Axis,
        schedule: Schedule,
        local_shape: LocalShape,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        layers = part.layers
        fits = axis.size == schedule.stages == len(layers) and all(len(c) == schedule.chunks for c in layers)
        if not fits or part.stage != axis.index:
            sizes = f"{axis.size} ranks, a schedule of {schedule.stages} × {schedule.chunks}, layers {layers}"
            raise ValueError(f"pipeline: {sizes}")
        self.model, self.axis, self.schedule = model, axis, schedule
        self.stage = part.stage
        self._local_shape, self._autocast = local_shape, autocast
        self._dtype = next(model.parameters()).dtype
        self._gradients = WeightGradients()
        if any(action.kind == "backward_weight" for action in schedule.actions[self.stage]):
            self._gradients.bind(model)
        blocks = dict(model.blocks.named_children())  # type: ignore[union-attr]
        self._layers = layers[self.stage]
        self._chunks = [[blocks[str(number)] for number in piece] for piece in self._layers]
        self._is_tied = part.tied and axis.size > 1
        self.hand_over: HandOver | None = None

    def step(self, inputs: Sequence[Tensor], targets: Sequence[Tensor], factor: float) -> Outcome:
        """Forward and backward of all micro-batches; gradients are added to the parameters' `.grad`, or handed over.

        Args:
            inputs: (B, T) int64 of every micro-batch, on all stages.
            targets: (B, T) int64 of every micro-batch, on all stages.
            factor: what losses are multiplied by before the backward pass: scale ÷ tokens of the whole step.

        Raises:
            ValueError: another number of micro-batches than the schedule's.
        """
        if len(inputs) != self.schedule.microbatches:
            raise ValueError(f"{len(inputs)} micro-batches for a schedule of {self.schedule.microbatches}")
        ledger = self.axis.ledger
        of_stages = ledger.by_axis.setdefault(self.axis.name, Total())
        begin, before = time.perf_counter(), of_stages.wait
        run = _Step(self, inputs, targets, factor)
        steps, computing = [], {"forward": 0.0, "backward": 0.0}
        for number, action in enumerate(self.schedule.actions[self.stage]):
            run.prepare(number)
            arrived = run.receive(action)
            start, stood = time.perf_counter(), ledger.waited()
            run.do(action, arrived)
            end = time.perf_counter()
            steps.append(Step(self.stage, action, start - begin, end - begin))
            kind = "forward" if action.kind == "forward" else "backward"
            computing[kind] += end - start - (ledger.waited() - stood)
        run.finish()
        losses = self._spread(run.losses)
        busy = sum(step.end - step.start for step in steps)
        if run.tied is not None:
            busy += run.tied.seconds
            computing["backward"] += run.tied.seconds
        idle = time.perf_counter() - begin - busy
        self.outcome = Outcome(losses, steps, busy, idle, begin, **computing, waited=of_stages.wait - before)
        return self.outcome

    @torch.no_grad()
    def evaluate(self, inputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        """Summed losses (M,) of any number of micro-batches, by forward passes only; the same on every stage."""
        stages, chunks = self.schedule.stages, self.schedule.chunks
        forwards = tuple(Action("forward", m, c) for c in range(chunks) for m in range(len(inputs)))
        plan = Schedule("gpipe", stages, len(inputs), chunks, (forwards,) * stages)
        mail = self._mail(plan, inputs)
        losses = torch.zeros(len(inputs), dtype=self._dtype, device=inputs[0].device)
        for action in forwards:
            _, microbatch, chunk = action
            x = self.begin(inputs[microbatch]) if self.first(chunk) else mail.collect(action)
            y = self.forward(chunk, x)
            if self.last(chunk):
                losses[microbatch] = self.end(y, targets[microbatch])
            else:
                mail.post(action, y)
        mail.close()
        return self._spread(losses)

    def _mail(self, plan: Schedule, inputs: Sequence[Tensor]) -> Mail:
        shapes = [self._local_shape(*tokens.shape) for tokens in inputs]
        return Mail(plan, self.axis, shapes, self._dtype, inputs[0].device)

    def _spread(self, losses: Tensor) -> Tensor:
        """The last stage's losses, on every stage; everyone waits for everyone."""
        return collectives.all_gather(losses[None], self.axis, dim=0, name="losses")[-1]

    def groups(self) -> list[list[str]]:
        """This stage's parameters by the time at which a micro-batch's gradients are complete.

        One group per chunk, and one more for a tied embedding.
        """
        found: list[list[str]] = [[] for _ in self._chunks]
        places = {number: chunk for chunk, piece in enumerate(self._layers) for number in piece}
        for name, _ in self.model.named_parameters():
            module, _, rest = name.partition(".")
            if not (self._is_tied and module == "embed"):
                inside = module == "blocks"
                chunk = places[int(rest.partition(".")[0])] if inside else -1 if module in ("norm", "head") else 0
                found[chunk].append(name)
        return [*found, *([name] for name in self.relays())]

    def relays(self) -> dict[str, Relay]:
        """Parameters whose gradient another stage makes or needs, too, and the way of the sum to the other."""
        ends = self._is_tied and self.stage in (0, self.axis.size - 1)
        return {"embed.weight": partial(relay, axis=self.axis)} if ends else {}

    def share(self, placements: Mapping[str, Placement]) -> dict[str, Placement]:
        """Placements that say that a tied embedding is on two stages; the first counts as its owner."""
        shared = dict(placements)
        if self._is_tied and "embed.weight" in shared:
            old = shared["embed.weight"]
            shared["embed.weight"] = dataclasses.replace(old, replicated_over=(*old.replicated_over, "pp"))
        return shared

    def first(self, chunk: int) -> bool:
        """Whether a chunk of this stage begins the model."""
        return self.stage == 0 and chunk == 0

    def last(self, chunk: int) -> bool:
        """Whether a chunk of this stage ends the model."""
        return self.stage == self.schedule.stages - 1 and chunk == self.schedule.chunks - 1

    def begin(self, tokens: Tensor) -> Tensor:
        """The model's embedded tokens; of a tied embedding without its part in the graph."""
        with self._autocast(), frozen(self.model.embed if self._is_tied else None):  # type: ignore[arg-type]
            return self.model.embed_tokens(tokens)  # type: ignore[no-any-return, operator]

    def forward(self, chunk: int, x: Tensor) -> Tensor:
        """Activations after a chunk's blocks."""
        with self._autocast():
            for block in self._chunks[chunk]:
                x = block(x)
            return x

    def end(self, x: Tensor, targets: Tensor) -> Tensor:
        """The summed loss; of a tied embedding without its part in the graph."""
        with self._autocast(), frozen(self.model.embed if self._is_tied else None):  # type: ignore[arg-type]
            return self.model.output(x, targets)  # type: ignore[no-any-return, operator]


class _Step:
    """The tensors of one step: what forward passes left for backward passes."""

    def __init__(self, pipeline: Pipeline, inputs: Sequence[Tensor], targets: Sequence[Tensor], factor: float) -> None:
        self.pipeline, self.inputs, self.targets, self.factor = pipeline, inputs, targets, factor
        self.mail = pipeline._mail(pipeline.schedule, inputs)
        self.held: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self.losses = torch.zeros(len(inputs), dtype=pipeline._dtype, device=inputs[0].device)
        self.tied: TiedEmbedding | None = None
        if pipeline._is_tied and pipeline.stage in (0, pipeline.schedule.stages - 1):
            arguments = inputs, targets, factor, pipeline._autocast, pipeline.hand_over
            self.tied = TiedEmbedding(pipeline.model, pipeline.axis, pipeline.schedule, *arguments)
        self.groups = pipeline.groups() if pipeline.hand_over else []
        self.aside: dict[tuple[int, int], dict[nn.Parameter, Tensor | None]] = {}

    def prepare(self, number: int) -> None:
        """What a tied embedding has to do before the action of this number."""
        if self.tied is not None:
            self.tied.before(number)

    def receive(self, action: Action) -> Tensor | None:
        """Wait for what an action needs from another stage."""
        if self.pipeline.schedule.waits_for(self.pipeline.stage, action) is None:
            return None
        return self.mail.collect(action)

    def do(self, action: Action, arrived: Tensor | None) -> None:
        """Run one action, and send its result on."""
        if action.kind == "forward":
            self._forward(action, arrived)
        elif action.kind == "backward_weight":
            self._take_up(action)
            self.pipeline._gradients.finish(action[1:])
            self._hand_over(action)
        elif action.kind == "backward_input":
            self.pipeline._gradients.begin(action[1:])
            self._backward(action, arrived)
            self.pipeline._gradients.end()
            self._lay_aside(action)
        else:
            self._backward(action, arrived)
            self._hand_over(action)

    def _hand_over(self, action: Action) -> None:
        """A micro-batch's gradients of a chunk are complete."""
        if self.pipeline.hand_over:
            self.pipeline.hand_over(self.groups[action.chunk], action.microbatch == len(self.inputs) - 1)

    def _lay_aside(self, action: Action) -> None:
        """Keep what a `backward_input` has made of gradients until the rest of the micro-batch's is there."""
        if self.pipeline.hand_over:
            named = [self.pipeline.model.get_parameter(name) for name in self.groups[action.chunk]]
            self.aside[action.microbatch, action.chunk] = {parameter: parameter.grad for parameter in named}
            for parameter in named:
                parameter.grad = None

    def _take_up(self, action: Action) -> None:
        """Put back what `_lay_aside` has kept."""
        for parameter, gradient in self.aside.pop((action.microbatch, action.chunk), {}).items():
            parameter.grad = gradient

    def finish(self) -> None:
        """After the last action."""
        self.mail.close()
        if self.tied is not None:
            self.tied.finish()

    def _forward(self, action: Action, arrived: Tensor | None) -> None:
        pipeline, (_, microbatch, chunk) = self.pipeline, action
        if arrived is not None:
            x = arrived.requires_grad_()
        else:
            x = pipeline.begin(self.inputs[microbatch])
            if self.tied is not None:
                x = x if x.requires_grad else x.requires_grad_()
                x.retain_grad()
        y = pipeline.forward(chunk, x)
        if not pipeline.last(chunk):
            self.mail.post(action, y.detach())
        else:
            if self.tied is not None:
                self.tied.keep(microbatch, y)
            y = pipeline.end(y, self.targets[microbatch])
            self.losses[microbatch] = y.detach()
        self.held[microbatch, chunk] = x, y

    def _backward(self, action: Action, arrived: Tensor | None) -> None:
        pipeline, (_, microbatch, chunk) = self.pipeline, action
        x, y = self.held.pop((microbatch, chunk))
        if arrived is None:
            (y * self.factor).backward()  # type: ignore[no-untyped-call]
        else:
            beginning(y, arrived).backward()  # type: ignore[no-untyped-call]
        if not pipeline.first(chunk):
            assert x.grad is not None
            self.mail.post(action, x.grad)
        elif self.tied is not None:
            assert x.grad is not None
            self.tied.send(x.grad)
