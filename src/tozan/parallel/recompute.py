"""Activation recomputation: keep less from the forward pass, compute it again in the backward pass.

`full` (arXiv 1604.06174) keeps only the input of each block. `selective` (the idea of arXiv 2205.05198: repeat what is
large but cheap) keeps the inputs of norms and activation functions, not their outputs: these are made again, and no
matrix product is, because recomputation stops as soon as the product's own input has been made.

Per token and block of width D, bf16 autocast over fp32, GPT-2 with F = 4D: `none` keeps 36·D bytes, `selective`
24·D, `full` 4·D.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from torch import nn
from torch.utils.checkpoint import checkpoint

Mode = Literal["none", "selective", "full"]


def apply(model: nn.Module, mode: Mode) -> None:
    """Sets what the model's blocks keep for the backward pass; gradients stay the same to the bit.

    May be called again with another mode. Dropout draws the same numbers when repeated.

    Args:
        model: has `blocks`; for `selective` each block names, in `recomputable`, its methods that start with
            element-wise work and end in one matrix product.
        mode: `none`, `selective` or `full`.

    Raises:
        ValueError: an unknown mode.
        AttributeError: `selective` for a block that has no `recomputable`.
    """
    if mode not in ("none", "selective", "full"):
        raise ValueError(f"recompute mode {mode!r} is none of none, selective, full")
    for block in model.blocks:  # type: ignore[union-attr]
        for path in ("forward", *getattr(block, "recomputable", ())):
            owner, method = _find(block, path)
            owner.__dict__.pop(method, None)  # what an earlier call put before the class's own method
        again = {"none": (), "selective": block.recomputable if mode == "selective" else (), "full": ("forward",)}
        for path in again[mode]:
            owner, method = _find(block, path)
            # A partial over a bound method, unlike a closure, follows its module through copy.deepcopy.
            owner.__dict__[method] = partial(_repeated, getattr(owner, method))


def _repeated(method: Callable[..., Any], *arguments: Any) -> Any:
    """Calls `method` so that backward calls it again; a function of its own because torch.compile skips torch's."""
    return checkpoint(method, *arguments, use_reentrant=False)


def _find(block: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that has the method at `path`, and the method's name."""
    parent, _, method = path.rpartition(".")
    return block.get_submodule(parent), method
