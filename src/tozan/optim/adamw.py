"""AdamW over named parameters, with a state that knows names instead of positions."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

SLOTS = ("exp_avg", "exp_avg_sq")


class AdamWTable(Protocol):
    """What `AdamW` reads: the `[optim]` table of a config."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


class AdamW:
    """AdamW (arXiv 1711.05101), torch's fused one: a single pass over memory per parameter.

    Matrices decay, vectors (norms and biases) do not. The state is addressed as `exp_avg/<parameter>` and
    `exp_avg_sq/<parameter>`, beside the number of `updates`, so that a checkpoint does not depend on the order of
    parameters.
    """

    # torch.optim.AdamW, around the same function, imports torch's compiler when it is made: 1.3 s of every start.

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], table: AdamWTable, matrices: Collection[str] | None = None
    ) -> None:
        self.parameters = dict(parameters)
        if matrices is None:
            matrices = {name for name, p in self.parameters.items() if p.ndim >= 2}
        decaying = [name for name in self.parameters if name in matrices]
        others = [name for name in self.parameters if name not in matrices]
        self._groups = ((decaying, table.weight_decay), (others, 0.0))
        self._options: dict[str, Any] = {"beta1": table.beta1, "beta2": table.beta2, "eps": table.eps}
        self._state = {slot: {n: torch.zeros_like(p) for n, p in self.parameters.items()} for slot in SLOTS}
        self._updates = {
            name: torch.zeros((), dtype=torch.float32, device=p.device) for name, p in self.parameters.items()
        }

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update every parameter that has a `.grad` from it at learning rate `lr`."""
        for group, decay in self._groups:
            names = [name for name in group if self.parameters[name].grad is not None]
            adamw(
                [self.parameters[name] for name in names],
                [gradient for name in names if (gradient := self.parameters[name].grad) is not None],
                [self._state["exp_avg"][name] for name in names],
                [self._state["exp_avg_sq"][name] for name in names],
                [],
                [self._updates[name] for name in names],
                fused=True,
                amsgrad=False,
                maximize=False,
                lr=lr,
                weight_decay=decay,
                **self._options,
            )

    def zero_grad(self) -> None:
        """Forget the gradients (and their memory)."""
        for parameter in self.parameters.values():
            parameter.grad = None

    @property
    def updates(self) -> int:
        """How many times the parameters were updated; bias correction depends on it."""
        return int(next(iter(self._updates.values())))

    @updates.setter
    def updates(self, count: int) -> None:
        for updates in self._updates.values():
            updates.fill_(count)

    def tensors(self) -> dict[str, Tensor]:
        """The live state, `{"<slot>/<parameter>": tensor}`; writing into them (and `updates`) restores a saved one."""
        return {f"{slot}/{name}": self._state[slot][name] for name in self.parameters for slot in SLOTS}
