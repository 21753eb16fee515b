"""Gradients on their way: launched unit by unit while the backward pass goes on, summed in a fixed order.

A hook on every parameter notes when its gradient is complete. When a unit has all of its gradients, and the units
before it in the fixed order have been launched, its sum over the ranks is launched and runs in gloo's threads. No
collective is started from a callback, and which is started after which never depends on timing, so that all ranks
start the same ones in the same order.

Two orders of summation:

* In the order of micro-batches (`every_micro_batch=True`): each micro-batch's gradients are sent to the owners of the
  shards, who add them one after the other. Micro-batch j of rank r is number j·n + r of the step, so the sum is
  ((g₀ + g₁) + g₂) + …, bit for bit that of a single process that runs the same micro-batches in that order. It costs
  one reduce_scatter per micro-batch instead of one per step, and holds only a shard of the gradient between them.
* In the order of ranks (False): each rank adds up its own micro-batches, and nothing is sent before the last one. As
  good numerically, and the same bits in every run of the same layout, but not the bits of another layout.

In a pipeline the backward passes of several micro-batches and pieces of the model interleave, so that hooks cannot tell
which micro-batch a gradient belongs to. There the pipeline says when a micro-batch's gradients of some parameters are
complete (`hand_over`); each schedule does so in the order of the micro-batches.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from tozan.comm import Axis, Handle
from tozan.comm import collectives as c
from tozan.parallel.flat import Unit

Relay = Callable[[Tensor], Handle]
"""Starts sending a part of a sum that was made here, or receiving one that was made elsewhere into the room for it."""

IN_FLIGHT = 2
"""Units whose gradients may be on their way at once: enough to keep the wire busy, and bounds the memory."""


class Synchronizer:
    """Sums the gradients of units over data-parallel ranks; rank i of `shards` ends up with shard i of each unit.

    Args:
        units: in the order in which the backward pass completes them.
        ranks: all data-parallel ranks.
        shards: the axis that a unit's shards lie along; `ranks` itself, or a part of it (hybrid sharding).
        copies: the axis along which shards are held again; `ranks` = copies × shards, shards innermost.
        every_micro_batch: reduce in every backward pass, not only in the last.
        in_order: with copies, sum over all ranks in their order, instead of inside first and then across.
        settled: called once per unit and step when its shard is being completed, in a fixed order.
        completed: called whenever a unit's gradients are complete on this rank, in every backward pass.
        relays: for units by name whose sum ranks outside of `ranks` need or make: what it goes through.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        ranks: Axis,
        shards: Axis,
        copies: Axis,
        every_micro_batch: bool,
        in_order: bool,
        settled: Callable[[Unit, Handle], None],
        completed: Callable[[Unit], None] = lambda _: None,
        relays: Mapping[str, Relay] | None = None,
    ) -> None:
        self._units, self._ranks, self._shards, self._copies = list(units), ranks, shards, copies
        self._every, self._in_order = every_micro_batch, in_order
        self._settled, self._completed, self._relays = settled, completed, relays or {}
        self._missing = [0] * len(self._units)
        self._next = len(self._units)  # the unit to launch next; none before the first `begin`
        self._reducing = self._last = False
        self._sums: dict[str, Tensor] = {}
        self._seen: int | None = None
        self._pending: deque[tuple[Unit, Handle, bool]] = deque()
        self._sending: list[Handle] = []
        # Parameters keep hooks where the garbage collector does not look: these may hold what holds them only weakly.
        me = weakref.ref(self)
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(partial(_arrived, me, number))  # type: ignore[no-untyped-call]
            for number, unit in enumerate(self._units)
            for parameter in unit.parameters.values()
        ]

    def begin(self, last: bool) -> None:
        """Say that the next backward pass is that of a new micro-batch, and whether it is the step's last."""
        self._close()
        self._last, self._reducing = last, last or self._every
        self._missing = [len(unit.parameters) for unit in self._units]
        self._next = 0

    def hand_over(self, names: Collection[str], last: bool) -> None:
        """In place of `begin`: one more micro-batch's gradients of these parameters are complete; send them.

        Args:
            names: parameters that make up whole units; the same on all ranks, call by call.
            last: whether this is the step's last micro-batch.
        """
        for unit in self._units:
            if unit.parameters.keys() <= set(names):
                self._launch(unit, last)
        self._last = True

    def finish(self) -> None:
        """After the last backward pass: send what is left and wait for all of it."""
        if not self._last:
            raise RuntimeError("finish() comes after a backward pass begun with begin(last=True)")
        self._close()
        while self._pending:
            self._settle()
        for unit in self._units:
            if unit.name in self._relays and unit.name not in self._sums:
                room = torch.empty(self._piece(unit), dtype=unit.dtype, device=unit.device)
                self._complete(unit, self._relays[unit.name](room).wait())
        # Not before: the other side receives when it has finished its own passes, which may need ours.
        for handle in self._sending:
            handle.wait()
        self._sending.clear()
        self._sums.clear()
        self._last = self._reducing = False

    def witness(self, on: bool) -> int | None:
        """Begin (or stop) to add up the bits of this rank's own gradients before they are sent.

        Returns:
            The sum since it was begun, as 64-bit words modulo 2⁶⁴; None if it was not on.
        """
        seen, self._seen = self._seen, 0 if on else None
        return seen

    def remove(self) -> None:
        """Take the hooks off the parameters."""
        for hook in self._hooks:
            hook.remove()

    def _note(self, number: int) -> None:
        """One more parameter of a unit has its gradient."""
        self._missing[number] -= 1
        if self._missing[number] == 0:
            self._completed(self._units[number])
        while self._reducing and self._next < len(self._units) and self._missing[self._next] == 0:
            self._launch_next()

    def _close(self) -> None:
        """Launch units of which some parameters had no part in the loss: their gradients are zero here."""
        while self._reducing and self._next < len(self._units):
            self._launch_next()

    def _launch_next(self) -> None:
        self._next += 1
        self._launch(self._units[self._next - 1], self._last)

    def _piece(self, unit: Unit) -> int:
        """Elements of a unit that a rank sums."""
        everywhere = self._copies.size > 1 and self._in_order
        return unit.total // (self._ranks if everywhere else self._shards).size

    def _launch(self, unit: Unit, last: bool) -> None:
        # By number and not by what has arrived: the order of operations must be the same on all ranks. And before the
        # next buffers are made, which may be as large as those that this gives back.
        while len(self._pending) >= IN_FLIGHT:
            self._settle()
        flat = unit.pack({name: p.grad for name, p in unit.parameters.items()})
        if self._seen is not None:
            self._seen = (self._seen + int(flat.view(torch.int64).sum())) % 2**64
        for parameter in unit.parameters.values():
            parameter.grad = None
        first = unit.name not in self._sums
        axis, piece = self._shards, self._piece(unit)
        if self._copies.size > 1 and self._in_order:
            # Rank r·S + i (copy r of shard i) gets piece r of shard i: the pieces must lie in the order of the ranks.
            flat = flat.view(self._shards.size, self._copies.size, -1).transpose(0, 1).reshape(-1)
            axis = self._ranks
        if first:
            self._sums[unit.name] = torch.empty(piece, dtype=unit.dtype, device=unit.device)
        into, sizes = self._sums[unit.name], [piece] * axis.size
        handle = c.scatter_sum_async(flat, axis, sizes, name=f"gradients of {unit.name}", into=into, first=first)
        self._pending.append((unit, handle, last))

    def _settle(self) -> None:
        unit, handle, last = self._pending.popleft()
        total = handle.wait()
        if last and unit.name in self._relays:
            self._sending.append(self._relays[unit.name](total))
        if last:
            self._complete(unit, total)

    def _complete(self, unit: Unit, total: Tensor) -> None:
        """Make this rank's shard of a unit's sum known, from the piece that it has summed."""
        name = f"gradients of {unit.name}"
        if self._copies.size == 1:
            self._settled(unit, Handle(self._shards, None, (), lambda: total))
        elif self._in_order:
            whole = total.new_empty(unit.shard)
            self._settled(unit, c.gather_into_async(whole, self._copies, total, name=name))
        else:
            self._settled(unit, c.all_reduce_async(total, self._copies, name=name, ordered=True))


def _arrived(synchronizer: weakref.ref[Synchronizer], number: int, _: Tensor) -> None:
    if (found := synchronizer()) is not None:
        found._note(number)
