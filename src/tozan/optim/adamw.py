"""AdamW over named parameters, with a state that knows names instead of positions."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

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

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], table: AdamWTable, matrices: Collection[str] | None = None
    ) -> None:
        self.parameters = dict(parameters)
        if matrices is None:
            matrices = {name for name, p in self.parameters.items() if p.ndim >= 2}
        decaying = [p for name, p in self.parameters.items() if name in matrices]
        others = [p for name, p in self.parameters.items() if name not in matrices]
        groups = [
            {"params": group, "weight_decay": decay}
            for group, decay in ((decaying, table.weight_decay), (others, 0.0))
            if group
        ]
        self._adamw = torch.optim.AdamW(
            groups, lr=table.lr, betas=(table.beta1, table.beta2), eps=table.eps, fused=True
        )
        for parameter in self.parameters.values():
            self._adamw.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                **{slot: torch.zeros_like(parameter) for slot in SLOTS},
            }

    def step(self, lr: float) -> None:
        """Update every parameter from its `.grad` at learning rate `lr`."""
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.step()

    def zero_grad(self) -> None:
        """Forget the gradients (and their memory)."""
        self._adamw.zero_grad(set_to_none=True)

    @property
    def updates(self) -> int:
        """How many times the parameters were updated; bias correction depends on it."""
        return int(next(iter(self._adamw.state.values()))["step"])

    @updates.setter
    def updates(self, count: int) -> None:
        for state in self._adamw.state.values():
            state["step"].fill_(count)

    def tensors(self) -> dict[str, Tensor]:
        """The live state, `{"<slot>/<parameter>": tensor}`; writing into them (and `updates`) restores a saved one."""
        return {
            f"{slot}/{name}": self._adamw.state[parameter][slot]
            for name, parameter in self.parameters.items()
            for slot in SLOTS
        }
