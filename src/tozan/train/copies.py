"""Copies of this rank's own state in memory that outlives it, after every step; only under an agent.

A copy holds the live tensors of this rank alone (its parameters or its shards of them, its optimizer state, the random
generator), in a fixed order, as raw bytes. Making one is a copy and a sum over memory; nothing is sent or written.
"""

from __future__ import annotations

import hashlib
import json
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tozan.comm import Axis, collectives
from tozan.recovery.slots import Slots

if TYPE_CHECKING:
    from tozan.train.run import Run


class Copies:
    """What this rank does with its memory; without an agent, nothing.

    Args:
        told: what the agent says in TOZAN_AGENT: file descriptors of the memory to write to, of the outbox for the
            neighbour and of the memory to resume from; which step to resume; how often to fill the outbox.

    Attributes:
        leave: whether this generation is there only to write a checkpoint of what is in memory.
    """

    def __init__(self, told: dict[str, Any] | None = None) -> None:
        self._slots = Slots(told["memory"]) if told else None
        self._outbox = Slots(told["outbox"]) if told and told["neighbour"] else None
        self._source = Slots(told["source"]) if told else None
        self._neighbour = told["neighbour"] if told else 0
        self.leave = bool(told and told["leave"])
        self._keeps = bool(told and told["copies"])
        self._resume: int | None = told["resume"] if told else None
        self._kept: int | None = None
        self._views: list[tuple[str, Tensor]] = []

    @staticmethod
    def open() -> Copies:
        """Those that the environment speaks of."""
        told = os.environ.get("TOZAN_AGENT")
        return Copies(json.loads(told) if told else None)

    def peak_flops(self) -> float | None:
        """The peak that was measured before, where there is a copy to resume from."""
        found = self._source.read(self._resume) if self._source and self._resume is not None else None
        return float(found[0]["peak_flops"]) if found else None

    def begin(self, step: int) -> None:
        """Leave word that a step was begun."""
        if self._slots:
            self._slots.begin(step)

    def keep(self, run: Run) -> None:
        """Copy the state of the step that was just done.

        Raises:
            SilentError: bits of it changed in memory since the update; the copy before stays the newest.
        """
        if not self._slots or not self._keeps or self._kept == run.step:
            return
        run.checks.confirm(run.step)
        self._write(run, self._slots)
        self._kept = run.step
        if self._outbox and run.step % self._neighbour == 0 and self._may_send(self._outbox, run.split.mesh.everyone):
            self._write(run, self._outbox)

    def _may_send(self, outbox: Slots, axis: Axis) -> bool:
        """Whether every rank's last copy has arrived at its neighbour; a collective.

        Until the next ones have arrived, that step is then whole in the outboxes as well as with the neighbours. A loss
        may have come between some ranks' copies and others': who is ahead then goes back to the step that all have.
        """
        mine = torch.tensor([[-1 if step is None else step for step in (outbox.newest(), outbox.arrived())]])
        everyone = collectives.all_gather(mine, axis, name="copies sent").tolist()
        there = {(newest, arrived) for newest, arrived in everyone if newest >= 0}
        common = min((newest for newest, _ in there), default=-1)
        outbox.forget(after=common)
        return all(pair == (common, common) for pair in there)

    def _write(self, run: Run, slots: Slots) -> None:
        bodies = [body for _, body in self._tensors(run)]
        length = sum(body.numel() for body in bodies)
        padded = -(-length // 8) * 8
        target = torch.frombuffer(slots.body(padded), dtype=torch.uint8)
        for part, body in zip(torch.split(target[:length], [b.numel() for b in bodies]), bodies, strict=True):
            part.copy_(body)
        target[length:] = 0
        head = {"of": self._signature(run), "meta": run.meta(), "peak_flops": run.peak_flops}
        slots.commit(run.step, head, padded, int(target.view(torch.int64).sum()))

    def resume(self, run: Run) -> bool:
        """Continue from the copy that the agent has chosen; False if it has chosen none.

        Raises:
            RuntimeError: the copy is damaged or belongs to another layout; the agent then chooses anew.
        """
        if self._resume is None:
            return False
        assert self._source
        self._restore(run, self._source, self._resume)
        return True  # not counted as kept: every rank keeps a copy of its own at once, wherever it resumed from

    def roll_back(self, run: Run) -> bool:
        """Go back to the newest copy, which undoes whatever has happened to the state since; False if there is none."""
        if self._kept is None or self._slots is None:
            return False
        self._restore(run, self._slots, self._kept)
        return True

    @torch.no_grad()
    def _restore(self, run: Run, slots: Slots, step: int) -> None:
        found = slots.read(step)
        if found is None or found[0]["of"] != self._signature(run):
            raise RuntimeError(f"the copy of step {step} in memory is damaged, or of another layout")
        head, body = found
        source, at = torch.frombuffer(body, dtype=torch.uint8), 0
        for name, live in self._tensors(run):
            live.copy_(source[at : at + live.numel()])
            if name == "rng/cpu":
                torch.set_rng_state(live)
            at += live.numel()
        run.split.sync.publish()
        run.take(step, head["meta"])

    def _tensors(self, run: Run) -> list[tuple[str, Tensor]]:
        """Everything that a copy holds, as flat views of bytes."""
        if not self._views:  # the live tensors stay where they are for the whole run
            named = {f"model/{name}": p.detach() for name, p in run.split.sync.parameters.items()}
            named |= {f"optimizer/{name}": t for name, t in run.optimizer.tensors().items()}
            self._views = [(name, t.view(-1).view(torch.uint8)) for name, t in named.items()]
        return [*self._views, ("rng/cpu", torch.get_rng_state())]

    def _signature(self, run: Run) -> str:
        """Tells apart copies that hold other tensors, or other parts of them."""
        return hashlib.sha256(json.dumps([run.config.layout.model_dump(), run.split.mesh.rank]).encode()).hexdigest()
