"""What a way of tensor parallelism has to say about a model: its layers, its output and its shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn

from tozan.layout import Role

Parameters = Mapping[str, nn.Parameter]
"""This rank's pieces of a layer's parameters: `weight`, and `bias` if there is one."""


class Scheme(Protocol):
    """A way of tensor parallelism; one implementation per scheme, none knows any model.

    Attributes:
        axes: mesh axes that the scheme spreads over.
        token_axes: those of them that the tokens of the residual stream are sharded over. A parameter that is not
            sharded over one of these sees only a part of the tokens, so its gradient is a part too.
    """

    axes: tuple[str, ...]
    token_axes: tuple[str, ...]

    def accepts(self, role: Role, module: nn.Module) -> str:
        """Empty if the scheme can shard this layer in this role, else what it would need instead."""

    def layer(self, role: Role, module: nn.Module, parameters: Parameters) -> nn.Module:
        """The sharded form of a layer, which holds `parameters` in place of the layer's own."""

    def output(self, x: Tensor, weight: Tensor, targets: Tensor | None, vocabulary: int) -> Tensor:
        """The output head.

        Args:
            x: the normed residual stream, in local form.
            weight: this rank's shard of the head's weight (V, D), in role `vocab`.
            targets: (B, T) int64, the same on all ranks of the scheme; -100 is left out.
            vocabulary: V.

        Returns:
            The loss summed over all B·T tokens, or without targets all logits (B, T, V); the same on all ranks.
        """

    def local_shape(self, batch: int, tokens: int, width: int) -> tuple[int, int, int]:
        """Shape of this rank's part of the residual stream (B, T, D)."""

    def enter(self, x: Tensor) -> Tensor:
        """This rank's part of a residual stream (B, T, D) that all ranks have whole."""

    def leave(self, x: Tensor) -> Tensor:
        """The whole residual stream (B, T, D), on all ranks, from every rank's part."""


class CalledHead(nn.Module):
    """An output head that is called as a layer: the local form of (B, T, D) to all logits (B, T, V), on every rank."""

    def __init__(self, parameters: Parameters, scheme: Scheme) -> None:
        super().__init__()
        self.weight = parameters["weight"]
        self._scheme = scheme

    def forward(self, x: Tensor) -> Tensor:
        """Gathered logits; `Scheme.output` with targets never gathers them."""
        return self._scheme.output(x, self.weight, None, 0)
