"""What pipeline stages send each other in one step, in the order that the schedule fixes.

Messages between two ranks arrive in the order in which they are sent. That order is known to the receiver: it is the
sender's list of the schedule. So a receiver can have buffers waiting for the next messages of every sender while it
computes, and needs no tags; what comes before it is needed is kept.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from tozan.comm import Axis, Handle, collectives
from tozan.schedules import Action, Schedule

AHEAD = 2
"""Receives that wait for each sender."""


class Mail:
    """A stage's messages of one step.

    Args:
        schedule: what every stage does.
        axis: the mesh's `pp`.
        shapes: shape of every micro-batch's message.
        dtype: of the messages.
        device: of the messages.
    """

    def __init__(
        self,
        schedule: Schedule,
        axis: Axis,
        shapes: Sequence[tuple[int, ...]],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._schedule, self._axis, self._shapes = schedule, axis, shapes
        self._dtype, self._device = dtype, device
        self._arrived: dict[Action, Tensor] = {}
        self._sending: list[tuple[Handle, Tensor]] = []
        self._awaited: dict[int, deque[Action]] = {}
        self._coming: dict[int, deque[tuple[Action, Tensor, Handle]]] = {}
        me = axis.index
        for source in set(range(schedule.stages)) - {me}:
            sent = [a for a in schedule.actions[source] if schedule.sends_to(source, a) == me]
            if sent:
                self._awaited[source] = deque(_needing(schedule, source, action) for action in sent)
                self._coming[source] = deque()
                self._listen(source)

    def post(self, action: Action, result: Tensor) -> None:
        """Send an action's result to the stage whose action needs it; returns at once."""
        me = self._axis.index
        to = self._schedule.sends_to(me, action)
        assert to is not None
        if to == me:
            self._arrived[_needing(self._schedule, me, action)] = result
            return
        result = result.contiguous()
        handle = collectives.send_async(result, self._axis, to, name=f"pipeline {action.kind}")
        self._sending = [(h, x) for h, x in self._sending if not h.is_completed()]
        self._sending.append((handle, result))

    def collect(self, action: Action) -> Tensor:
        """What `action` needs, once it has arrived."""
        needed = self._schedule.waits_for(self._axis.index, action)
        assert needed is not None
        source = needed[0]
        while action not in self._arrived:
            coming, buffer, handle = self._coming[source].popleft()
            handle.wait()
            self._arrived[coming] = buffer
            self._listen(source)
        return self._arrived.pop(action)

    def close(self) -> None:
        """Wait until everything sent is on its way."""
        for handle, _ in self._sending:
            handle.wait()
        self._sending.clear()

    def _listen(self, source: int) -> None:
        """Keep `AHEAD` receives waiting for a sender."""
        while self._awaited[source] and len(self._coming[source]) < AHEAD:
            action = self._awaited[source].popleft()
            buffer = torch.empty(self._shapes[action.microbatch], dtype=self._dtype, device=self._device)
            handle = collectives.recv_async(buffer, self._axis, source, name=f"pipeline {action.kind}")
            self._coming[source].append((action, buffer, handle))


def _needing(schedule: Schedule, stage: int, action: Action) -> Action:
    """The action that needs the result of a stage's action: of the next virtual stage, or of the previous one."""
    virtual = action.chunk * schedule.stages + stage + (1 if action.kind == "forward" else -1)
    return Action(action.kind, action.microbatch, virtual // schedule.stages)
