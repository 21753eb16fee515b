"""The networks: plain PyTorch, rank-blind, with their arithmetic beside them.

Importing this package does not import torch; asking it for a model does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tozan.models.arithmetic import Shape, resolve

if TYPE_CHECKING:
    from tozan.models.gpt2 import GPT2
    from tozan.models.llama import Llama

__all__ = ["GPT2", "Llama", "Shape", "create", "resolve", "skeleton"]

_LAZY = {"GPT2": "tozan.models.gpt2", "Llama": "tozan.models.llama"}


def __getattr__(name: str) -> Any:
    """Imports a model only when it is asked for (PEP 562)."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def create(shape: Shape, seed: int) -> GPT2 | Llama:
    """Builds a model with its initial weights, in fp32 on the CPU.

    Args:
        shape: all sizes, and the family.
        seed: each parameter's first value depends on this, the parameter's name and its global size only.

    Returns:
        A `GPT2` or a `Llama`, in training mode.
    """
    from tozan.models.layers import initialize

    model = skeleton(shape)
    initialize(model, shape, seed)
    return model


def skeleton(shape: Shape) -> GPT2 | Llama:
    """A model without values: its parameters are on the meta device, to be sharded, then filled."""
    import torch

    from tozan.models.gpt2 import GPT2
    from tozan.models.layers import Unfilled
    from tozan.models.llama import Llama

    with torch.device("meta"), Unfilled():
        return GPT2(shape) if shape.family == "gpt2" else Llama(shape)
