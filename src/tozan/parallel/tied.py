"""A tied embedding across a pipeline: the first stage looks tokens up in it, the last one multiplies with it.

In one process the two uses' gradients of a micro-batch are added first, and then to those of the micro-batches before:
((h₀ + e₀) + (h₁ + e₁)) + … Adding up each use on its own stage would give other bits. So the first stage sends what its
part of the gradient is made of, the gradient of the embedded tokens (as large as any message of the pipeline), and
the last stage makes both parts and adds them in that order; the sum goes back once per step.

When the first stage's message comes, the head's logits are long gone. The last stage therefore leaves the weight's
gradient out of its backward pass and makes it then, from the head's input: one more product with the vocabulary per
micro-batch, most of it at the end, where the last stage waits for the others anyway. At which of its actions it does
so is read off the schedule's replay, so that all ranks of a stage do the same and nobody waits for himself.

With replicas that take over gradients micro-batch by micro-batch, the sum over the replicas is made on the last stage,
and each replica's part of that is what goes back (`relay`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tozan.comm import Axis, Handle, collectives
from tozan.ops.compiler import beginning
from tozan.schedules import Schedule, replay

TAG = 1
"""Keeps these messages apart from the pipeline's own."""
COSTS = {"forward": 1.0, "backward": 2.0, "backward_input": 1.0, "backward_weight": 1.0}


@contextmanager
def frozen(*modules: nn.Module | None) -> Iterator[None]:
    """Inside, the parameters of these modules take part in no graph."""
    parameters = [p for module in modules if module is not None for p in module.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def due(schedule: Schedule) -> list[list[int]]:
    """The micro-batches whose message has come before each action of the last stage; in the last list, at the end."""
    steps = replay(schedule, lambda _, action: COSTS[action.kind])
    kinds = "backward", "backward_input"
    sent = [
        (step.end, step.action.microbatch)
        for step in steps
        if step.stage == 0 and step.action.chunk == 0 and step.action.kind in kinds
    ]
    start = {step.action: step.start for step in steps if step.stage == schedule.stages - 1}
    found, done = [], 0
    for action in schedule.actions[-1]:
        come = sum(end <= start[action] for end, _ in sent)
        found.append([microbatch for _, microbatch in sorted(sent)[done:come]])
        done = come
    return [*found, [microbatch for _, microbatch in sorted(sent)[done:]]]


class TiedEmbedding:
    """One step's gradients of a tied embedding, on the first or the last of several stages.

    Args:
        model: this stage's part; it has `embed`.
        axis: the mesh's `pp`.
        schedule: what every stage does.
        inputs: tokens of every micro-batch.
        targets: targets of every micro-batch.
        factor: what losses are multiplied by before the backward pass.
        autocast: opens the context that forward passes run in.
        hand_over: takes each micro-batch's gradient, and has the sum sent back; None sends it from here.

    Attributes:
        seconds: spent computing, waits left out.
    """

    def __init__(
        self,
        model: nn.Module,
        axis: Axis,
        schedule: Schedule,
        inputs: Sequence[Tensor],
        targets: Sequence[Tensor],
        factor: float,
        autocast: Callable[[], AbstractContextManager[Any]],
        hand_over: Callable[[Collection[str], bool], None] | None = None,
    ) -> None:
        self._model, self._axis, self._inputs, self._targets = model, axis, inputs, targets
        self._factor, self._autocast, self._hand_over = factor, autocast, hand_over
        embed = model.embed
        assert isinstance(embed, nn.Module)
        assert isinstance(embed.weight, nn.Parameter)
        self._embed, self._weight = embed, embed.weight
        self._last = axis.size - 1
        self._due = due(schedule) if axis.index == self._last else []
        self._sending: list[Handle] = []
        self._held: dict[int, Tensor] = {}
        self.seconds = 0.0

    def send(self, gradient: Tensor) -> None:
        """On the first stage: pass the gradient of a micro-batch's embedded tokens on."""
        self._sending.append(collectives.send_async(gradient, self._axis, self._last, tag=TAG, name="tied embedding"))

    def keep(self, microbatch: int, x: Tensor) -> None:
        """On the last stage: keep what the output head was given."""
        self._held[microbatch] = x.detach()

    def before(self, number: int) -> None:
        """On the last stage: make the gradients that are due before its action of this number."""
        if self._due:
            for microbatch in self._due[number]:
                self._add(microbatch)
                if self._hand_over:
                    self._hand_over(["embed.weight"], microbatch == len(self._inputs) - 1)

    def finish(self) -> None:
        """After the last action: both stages have the sum."""
        for handle in self._sending:
            handle.wait()
        if self._axis.index == self._last:
            self.before(-1)
        if self._hand_over:
            return
        if self._axis.index == self._last:
            assert self._weight.grad is not None
            collectives.send(self._weight.grad, self._axis, 0, tag=TAG, name="tied embedding")
        else:
            total = torch.empty_like(self._weight)
            self._weight.grad = collectives.recv(total, self._axis, self._last, tag=TAG, name="tied embedding")

    def _add(self, microbatch: int) -> None:
        """Make both uses' gradients of a micro-batch and add their sum to the parameter's."""
        x, start = self._held.pop(microbatch), time.perf_counter()
        with torch.enable_grad(), self._autocast():
            with frozen(self._model.norm):  # type: ignore[arg-type]
                loss = self._model.output(x, self._targets[microbatch])  # type: ignore[operator]
            (of_head,) = torch.autograd.grad(loss * self._factor, self._weight)
            embedded = self._embed(self._inputs[microbatch])
        self.seconds += time.perf_counter() - start
        gradient = collectives.recv(torch.empty_like(embedded), self._axis, 0, tag=TAG, name="tied embedding")
        start = time.perf_counter()
        (of_embedding,) = torch.autograd.grad(beginning(embedded, gradient), self._weight)
        beginning(self._weight, of_head + of_embedding).backward()  # type: ignore[no-untyped-call]
        self.seconds += time.perf_counter() - start


def relay(total: Tensor, axis: Axis) -> Handle:
    """Send the sum of a tied embedding's gradients from the last stage, or receive it on the first, into `total`."""
    if axis.index == 0:
        return collectives.recv_async(total, axis, axis.size - 1, tag=TAG, name="tied embedding")
    return collectives.send_async(total, axis, 0, tag=TAG, name="tied embedding")
