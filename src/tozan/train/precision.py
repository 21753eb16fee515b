"""Compute precision: autocast over fp32 master weights, the loss scale that fp16 needs, and everything in fp64."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


class Precision:
    """How a step computes: `autocast()` around the forward pass, and a dynamic loss scale for fp16.

    The scale starts at 2^16, halves whenever a gradient overflows and doubles after 2,000 good steps in a row
    (mixed precision training, arXiv 1710.03740). Scales are powers of two, so they change no bit of a finite gradient.

    Attributes:
        dtype: of matrix products.
        weights: of weights, gradients, optimizer state and what is not a matrix product.
    """

    growth_interval = 2_000

    def __init__(self, name: Literal["fp32", "bf16", "fp16", "fp64"], device: torch.device) -> None:
        self.name = name
        self.dtype = DTYPES[name]
        self.weights = torch.float64 if name == "fp64" else torch.float32
        self.device = device
        self.scale = 2.0**16 if name == "fp16" else 1.0
        self.good_steps = 0

    def autocast(self) -> AbstractContextManager[object]:
        """Context in which matrix products run in the compute type."""
        if self.dtype == self.weights:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def update(self, overflow: bool) -> None:
        """Adapt the loss scale after a step; does nothing but for fp16."""
        if self.name != "fp16":
            return
        self.good_steps = 0 if overflow else self.good_steps + 1
        if overflow:
            self.scale = max(1.0, self.scale / 2)
        elif self.good_steps == self.growth_interval:
            self.scale, self.good_steps = self.scale * 2, 0

    def can_shrink(self) -> bool:
        """Whether an overflow may be the scale's fault, not the model's."""
        return self.name == "fp16" and self.scale > 1.0

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"scale": self.scale, "good_steps": self.good_steps}

    def load(self, state: dict[str, float]) -> None:
        """Continue from `state()`; a run resumed in another precision starts its scale anew."""
        if self.name == "fp16" and state["scale"] > 1.0:
            self.scale, self.good_steps = state["scale"], int(state["good_steps"])
