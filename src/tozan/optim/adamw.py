"""AdamW over named parameters, with a state that knows names instead of positions."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from tozan.ops.update import Rates, adamw

SLOTS = ("exp_avg", "exp_avg_sq")


class AdamWTable(Protocol):
    """What `AdamW` reads: the `[optim]` table of a config."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


class AdamW:
    """AdamW (arXiv 1711.05101), a single pass over memory (`ops.adamw`).

    Matrices decay, vectors (norms and biases) do not. The state is addressed as `exp_avg/<parameter>` and
    `exp_avg_sq/<parameter>`, beside the number of `updates`, so that a checkpoint does not depend on the order of
    parameters.

    Attributes:
        updates: how many times the parameters were updated; bias correction depends on it.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], table: AdamWTable, matrices: Collection[str] | None = None
    ) -> None:
        self.parameters = dict(parameters)
        if matrices is None:
            matrices = {name for name, p in self.parameters.items() if p.ndim >= 2}
        decaying = [name for name in self.parameters if name in matrices]
        others = [name for name in self.parameters if name not in matrices]
        self._groups = ((decaying, table.weight_decay), (others, 0.0))
        self._table = table
        self._state = {slot: {n: torch.zeros_like(p) for n, p in self.parameters.items()} for slot in SLOTS}
        self.updates = 0

    @torch.no_grad()
    def step(self, lr: float, scale: float = 1.0) -> dict[str, int]:
        """Update every parameter that has a `.grad` from it.

        Args:
            lr: learning rate.
            scale: what gradients are multiplied by first.

        Returns:
            Checksums of what was written, if they are known: `parameter/<parameter>`, and by the names of `tensors`.
        """
        self.updates += 1
        table = self._table
        written: dict[str, int] = {}
        for group, decay in self._groups:
            names = [name for name in group if self.parameters[name].grad is not None]
            sums = adamw(
                [self.parameters[name] for name in names],
                [gradient for name in names if (gradient := self.parameters[name].grad) is not None],
                [self._state["exp_avg"][name] for name in names],
                [self._state["exp_avg_sq"][name] for name in names],
                Rates(lr, table.beta1, table.beta2, table.eps, decay, self.updates, scale),
            )
            for name, own in zip(names, sums, strict=bool(sums)):
                written |= {f"{kind}/{name}": value for kind, value in zip(("parameter", *SLOTS), own, strict=True)}
        return written

    def zero_grad(self) -> None:
        """Forget the gradients (and their memory)."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def tensors(self) -> dict[str, Tensor]:
        """The live state, `{"<slot>/<parameter>": tensor}`; writing into them (and `updates`) restores a saved one."""
        return {f"{slot}/{name}": self._state[slot][name] for name in self.parameters for slot in SLOTS}
