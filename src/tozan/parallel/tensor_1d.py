"""1D tensor parallelism (Megatron-LM, arXiv 1909.08053), with sequence parallelism (arXiv 2205.05198) if asked for.

A column-parallel product has its outputs sharded, a row-parallel one its inputs, so that a pair of them needs one
sum over the ranks, forward at its end and backward at its beginning. Shapes: B samples, T tokens, D width, V
vocabulary, on n ranks. The layout in one table (columns are PyTorch's weight dims, outputs × inputs):

| role         | parameters       | activations in        | out                     | forward / backward          |
|--------------|------------------|-----------------------|-------------------------|-----------------------------|
| `qkv`, `col` | (out/n, in)      | (B, T, in)            | (B, T, out/n)           | identity / all-reduce       |
| `row`        | (out, in/n)      | (B, T, in/n)          | (B, T, out)             | all-reduce / identity       |
| `vocab`      | (V/n, D)         | tokens, or (B, T, D)  | (B, T, D), or the loss  | all-reduce / identity       |
| `norm`, `position` | whole      |                       |                         |                             |

Per layer and micro-batch a rank sends 2 all-reduces of B·T·D elements forward and 2 backward (one for each pair).
With sequence parallelism each becomes an all-gather or a reduce-scatter pair of the same volume (see `sequence.py`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tozan.comm import Axis, Mesh, functions
from tozan.layout import Role, split
from tozan.ops import linear, product
from tozan.ops.products import compute_dtype
from tozan.parallel.scheme import CalledHead, Parameters
from tozan.parallel.sequence import SequencePosition, check_tokens
from tozan.parallel.vocabulary import own_rows, sharded_cross_entropy

TOKENS = 1
"""The dim of (B, T, D) that sequence parallelism shards."""


class Entrance:
    """Where activations enter column-parallel products.

    Layers that read the same tensor (gate and up; separate q, k and v) share one transfer: the last one is kept, and
    given again to whoever comes with the same tensor.
    """

    def __init__(self, axis: Axis, sequence: bool) -> None:
        self.axis = axis
        self.sequence = sequence
        self._last: tuple[Tensor, int, bool, Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Identity forward, all-reduce of the gradient backward, both in the compute type.

        With sequence parallelism all-gather of (B, T/n, D) to (B, T, D) forward, reduce-scatter backward.
        """
        if self._last is not None and not x.is_inference():
            source, version, recording, result = self._last
            if source is x and version == x._version and recording == torch.is_grad_enabled():
                return result
        ready = x.to(compute_dtype(x))
        if self.sequence:
            result = functions.all_gather_from(ready, self.axis, dim=TOKENS, name="tp enter")
        else:
            result = functions.copy_to(ready, self.axis, name="tp enter")
        if not x.is_inference():  # such tensors have no version to compare
            self._last = x, x._version, torch.is_grad_enabled(), result
        return result


class ColumnParallelLinear(nn.Module):
    """y = x·Wᵀ + b with this rank's rows of W: (B, T, in) to (B, T, out/n)."""

    def __init__(self, parameters: Parameters, enter: Entrance) -> None:
        super().__init__()
        self.weight = parameters["weight"]
        self.bias = parameters.get("bias")
        self.product: Callable[..., Tensor] = linear
        self._enter = enter

    def forward(self, x: Tensor) -> Tensor:
        """This rank's outputs."""
        return self.product(self._enter(x), self.weight, self.bias)


class RowParallelLinear(nn.Module):
    """y = x·Wᵀ + b with this rank's columns of W: (B, T, in/n) to (B, T, out), or to (B, T/n, out)."""

    def __init__(self, parameters: Parameters, axis: Axis, sequence: bool) -> None:
        super().__init__()
        self.weight = parameters["weight"]
        self.bias = parameters.get("bias")
        self.product: Callable[..., Tensor] = linear
        self._axis, self._sequence = axis, sequence

    def forward(self, x: Tensor) -> Tensor:
        """The products summed over the ranks; the bias, which all ranks have, is added once, after the sum."""
        y = _reduce(self.product(x, self.weight), self._axis, self._sequence)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def _reduce(partial: Tensor, axis: Axis, sequence: bool) -> Tensor:
    """The sum over ranks of (B, T, D): whole, or this rank's tokens of it."""
    if sequence:
        return functions.reduce_scatter_to(partial, axis, dim=TOKENS, name="tp leave")
    return functions.reduce_from(partial, axis, name="tp leave")


class VocabularyParallelEmbedding(nn.Module):
    """Looks tokens up in this rank's rows of the embedding; other ranks' tokens give zeros, and the sum all."""

    def __init__(self, parameters: Parameters, axis: Axis, sequence: bool) -> None:
        super().__init__()
        self.weight = parameters["weight"]
        self._axis, self._sequence = axis, sequence

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) int64 to (B, T, D), or (B, T/n, D)."""
        if self._sequence:
            check_tokens(tokens.shape[TOKENS], self._axis.size)
        return _reduce(own_rows(tokens, self.weight, self._axis), self._axis, self._sequence)


class VocabularyProducts:
    """The output head's products on rows of W: a `vocabulary.Head`."""

    def __init__(self, axis: Axis) -> None:
        self.axis = axis

    def logits(self, x: Tensor, weight: Tensor) -> Tensor:
        """X·Wᵀ with this rank's rows of W."""
        return product(x, weight.T, x.dtype)

    def input_gradient(self, gradient: Tensor, weight: Tensor) -> Tensor:
        """This rank's part of G·W; the entrance of X sums the parts."""
        return product(gradient, weight, gradient.dtype)

    def weight_gradient(self, gradient: Tensor, x: Tensor) -> Tensor:
        """Gᵀ·X, complete."""
        return product(gradient.T, x, gradient.dtype)


class Tensor1D:
    """The scheme: see the table at the top.

    Args:
        mesh: its axis `tp` holds the n ranks.
        sequence: keep only T/n tokens of the residual stream on each rank, norms included.
    """

    axes: tuple[str, ...] = ("tp_col",)

    def __init__(self, mesh: Mesh, sequence: bool = False) -> None:
        self.axis = mesh["tp"]
        self.sequence = sequence
        self.token_axes: tuple[str, ...] = ("tp_col",) if sequence else ()
        self._enter = Entrance(self.axis, sequence)

    @staticmethod
    def accepts(role: Role, module: nn.Module) -> str:
        """Norms of any kind are welcome: every rank has all of them, over whole tokens."""
        kinds: dict[str, tuple[type[nn.Module], ...]] = {
            "norm": (nn.Module,),
            "position": (nn.Embedding,),
            "vocab": (nn.Embedding, nn.Linear),
        }
        wanted = kinds.get(role, (nn.Linear,))
        return "" if isinstance(module, wanted) else " or ".join(f"nn.{kind.__name__}" for kind in wanted)

    def layer(self, role: Role, module: nn.Module, parameters: Parameters) -> nn.Module:
        """The sharded layer of a role."""
        if role in ("qkv", "col"):
            return ColumnParallelLinear(parameters, self._enter)
        if role == "row":
            return RowParallelLinear(parameters, self.axis, self.sequence)
        if role == "vocab" and isinstance(module, nn.Embedding):
            return VocabularyParallelEmbedding(parameters, self.axis, self.sequence)
        if role == "vocab":
            return CalledHead(parameters, self)
        if role == "position" and self.sequence:
            return SequencePosition(parameters, self.axis)
        return module

    def output(self, x: Tensor, weight: Tensor, targets: Tensor | None, vocabulary: int) -> Tensor:
        """Loss without gathering logits; logits gathered (see `Scheme.output`)."""
        x = self._enter(x)
        if targets is None:
            return functions.gather_from(linear(x, weight), self.axis, dim=-1, name="logits")
        head = VocabularyProducts(self.axis)
        return sharded_cross_entropy(x.flatten(0, 1), weight, targets.flatten(), head, vocabulary)

    def local_shape(self, batch: int, tokens: int, width: int) -> tuple[int, int, int]:
        """(B, T, D), or (B, T/n, D)."""
        return batch, len(split(tokens, self.axis.size, 0)) if self.sequence else tokens, width

    def enter(self, x: Tensor) -> Tensor:
        """The same x, or this rank's tokens of it."""
        return functions.scatter_to(x, self.axis, dim=TOKENS) if self.sequence else x

    def leave(self, x: Tensor) -> Tensor:
        """The same x, or all tokens."""
        return functions.gather_from(x, self.axis, dim=TOKENS) if self.sequence else x
