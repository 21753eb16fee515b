"""GPT-2 (Radford et al. 2019): LayerNorm before each branch, learned positions, GELU, biases everywhere.

Shapes: B samples, T tokens, D width, F inner width of the MLP, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tozan.models.arithmetic import Shape
from tozan.models.layers import Attention, Cache, LayerNorm, Linear, Past
from tozan.ops import gelu, linear, linear_cross_entropy

ROLES = {
    "embed": "vocab",
    "position": "position",
    "blocks.*.norm1": "norm",
    "blocks.*.attn.qkv": "qkv",
    "blocks.*.attn.proj": "row",
    "blocks.*.norm2": "norm",
    "blocks.*.mlp.fc": "col",
    "blocks.*.mlp.proj": "row",
    "norm": "norm",
    "head": "vocab",
}
"""What each module's parameters are to a tensor-parallel scheme."""


class MLP(nn.Module):
    """Two linear layers with a GELU between them (its tanh form, as GPT-2 was trained)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.fc = Linear(shape.width, shape.mlp_width)
        self.proj = Linear(shape.mlp_width, shape.width)

    def forward(self, hidden: Tensor) -> Tensor:
        """From what `fc` returned, (B, T, F), to (B, T, D)."""
        return self.proj(gelu(hidden))  # type: ignore[no-any-return]


class Block(nn.Module):
    """One transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

    recomputable = ("enter_attention", "enter_mlp", "mlp.forward")
    """Methods that start with element-wise work and end in one matrix product: selective recomputation keeps their
    inputs and repeats the element-wise part alone."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm1 = LayerNorm(shape.width, shape.norm_eps)
        self.attn = Attention(shape, bias=True)
        self.norm2 = LayerNorm(shape.width, shape.norm_eps)
        self.mlp = MLP(shape)
        self.dropout = nn.Dropout(shape.dropout)

    def enter_attention(self, x: Tensor) -> Tensor:
        """Queries, keys and values of the residual stream: (B, T, D) to (B, T, 3D)."""
        return self.attn.qkv(self.norm1(x))  # type: ignore[no-any-return]

    def enter_mlp(self, x: Tensor) -> Tensor:
        """The MLP's first product: (B, T, D) to (B, T, F)."""
        return self.mlp.fc(self.norm2(x))  # type: ignore[no-any-return]

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        """The residual stream (B, T, D) after this block; `past` holds the keys and values of earlier tokens."""
        x = x + self.dropout(self.attn(self.enter_attention(x), past))
        return x + self.dropout(self.mlp(self.enter_mlp(x)))  # type: ignore[no-any-return]


class GPT2(nn.Module):
    """The whole network. Parameters are not set here: see `layers.initialize`.

    Args:
        shape: all sizes.
    """

    roles = ROLES

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed = nn.Embedding(shape.vocabulary, shape.width)
        self.position = nn.Embedding(shape.sequence, shape.width)
        self.dropout = nn.Dropout(shape.dropout)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = LayerNorm(shape.width, shape.norm_eps)
        self.head = None if shape.tied else Linear(shape.width, shape.vocabulary, bias=False)

    def embed_tokens(self, tokens: Tensor, start: int = 0) -> Tensor:
        """Token and position embeddings: (B, T) int64, whose first token stands at `start`, to (B, T, D)."""
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        return self.dropout(self.embed(tokens) + self.position(positions))  # type: ignore[no-any-return]

    def hidden(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """The residual stream (B, T, D) after the last block."""
        x: Tensor = self.embed_tokens(tokens, cache.length if cache else 0)
        for index, block in enumerate(self.blocks):
            x = block(x, cache.blocks[index] if cache else None)
        return x

    def output(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) of the residual stream (B, T, D); given targets (B, T), the summed loss instead."""
        x = self.norm(x)
        weight: Tensor = self.embed.weight if self.head is None else self.head.weight
        if targets is None:
            return linear(x, weight)
        return linear_cross_entropy(x.flatten(0, 1), weight, targets.flatten())

    def forward(self, tokens: Tensor, targets: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """Predicts the token after each of `tokens`.

        Args:
            tokens: (B, T) int64, T at most `shape.sequence`.
            targets: (B, T) int64, the tokens to predict; -100 is left out of the loss.
            cache: keys and values of the tokens before these; extended in place.

        Returns:
            Logits (B, T, V); with targets, the fp32 sum over tokens of -log p(target).
        """
        return self.output(self.hidden(tokens, cache), targets)
