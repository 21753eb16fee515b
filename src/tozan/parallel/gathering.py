"""ZeRO stage 3's parameters: whole only while they are used, each block's gathered while the one before computes.

A parameter keeps its shape and its place in a flat buffer for ever; freeing takes away the buffer's memory, gathering
gives it memory and values again. What autograd saved for the backward pass are views of that buffer, so they see the
values of whoever gathered last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tozan.comm import Axis, Handle
from tozan.comm import collectives as c
from tozan.parallel.flat import Unit


class Gathering:
    """Hooks that gather and free the units of a model.

    Units outside of the blocks are gathered when the model is called and stay until `free_all`.

    Args:
        model: calls its blocks in order.
        blocks: modules, one for each of `inner`.
        inner: the units of the blocks.
        outer: the units of the rest.
        flats: whole buffer of each unit; freed here.
        own: this rank's shard of each unit.
        axis: where the shards lie.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        inner: Sequence[Unit],
        outer: Sequence[Unit],
        flats: Mapping[str, Tensor],
        own: Mapping[str, Tensor],
        axis: Axis,
    ) -> None:
        self._inner, self._outer = list(inner), list(outer)
        self._flats, self._own, self._axis = flats, own, axis
        self._flying: dict[str, Handle] = {}
        self._whole = {unit.name for unit in (*inner, *outer)}
        self.free_all()
        self._hooks: list[Any] = [
            model.register_forward_pre_hook(self._before_model),
            model.register_forward_hook(self._after_model),
        ]
        for number, block in enumerate(blocks):
            self._hooks += [
                block.register_forward_pre_hook(self._before(number, 1)),
                block.register_forward_hook(self._after(number)),
                block.register_full_backward_pre_hook(self._before(number, -1)),
            ]

    def backward_done(self, unit: Unit) -> None:
        """All gradients of a unit are there: a block's parameters are of no more use in this pass."""
        if unit in self._inner:
            self._free(unit)

    def free_all(self) -> None:
        """Free every unit."""
        for unit in (*self._inner, *self._outer):
            self._free(unit)

    def remove(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()

    def _before_model(self, *_: Any) -> None:
        for unit in (*self._outer, *self._inner[:1]):
            self._start(unit)
        for unit in self._outer:
            self._need(unit)

    def _after_model(self, *_: Any) -> None:
        if not torch.is_grad_enabled():
            self.free_all()

    def _before(self, number: int, step: int) -> Any:
        def hook(*_: Any) -> None:
            self._need(self._inner[number])
            if 0 <= number + step < len(self._inner):
                self._start(self._inner[number + step])

        return hook

    def _after(self, number: int) -> Any:
        def hook(*_: Any) -> None:
            # The backward pass begins with the last block: it would be gathered again at once.
            if number < len(self._inner) - 1 or not torch.is_grad_enabled():
                self._free(self._inner[number])

        return hook

    def _start(self, unit: Unit) -> None:
        if unit.name in self._whole or unit.name in self._flying:
            return
        flat = self._flats[unit.name]
        flat.untyped_storage().resize_(flat.numel() * flat.element_size())
        with torch.no_grad():
            self._flying[unit.name] = c.gather_into_async(
                flat, self._axis, self._own[unit.name], name=f"parameters of {unit.name}"
            )

    def _need(self, unit: Unit) -> None:
        self._start(unit)
        if unit.name in self._flying:
            self._flying.pop(unit.name).wait()
            self._whole.add(unit.name)

    def _free(self, unit: Unit) -> None:
        if unit.name in self._flying:
            self._need(unit)
        if unit.name in self._whole:
            self._whole.discard(unit.name)
            self._flats[unit.name].untyped_storage().resize_(0)
