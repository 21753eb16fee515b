"""LLaMA (arXiv 2302.13971, 2307.09288): RMSNorm, rotary positions, SwiGLU, grouped-query attention, no biases.

Shapes: B samples, T tokens, D width, K·S width of all keys, F inner width of the MLP, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor, nn

from tozan.models.arithmetic import Shape
from tozan.models.layers import Attention, Cache, Linear, Past, RMSNorm, Rotary
from tozan.ops import linear, linear_cross_entropy, swiglu

ROLES = {
    "embed": "vocab",
    "blocks.*.norm1": "norm",
    "blocks.*.attn.qkv": "qkv",
    "blocks.*.attn.proj": "row",
    "blocks.*.norm2": "norm",
    "blocks.*.mlp.gate": "col",
    "blocks.*.mlp.up": "col",
    "blocks.*.mlp.down": "row",
    "norm": "norm",
    "head": "vocab",
}
"""What each module's parameters are to a tensor-parallel scheme."""


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202): down(silu(gate(x)) · up(x))."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate = Linear(shape.width, shape.mlp_width, bias=False)
        self.up = Linear(shape.width, shape.mlp_width, bias=False)
        self.down = Linear(shape.mlp_width, shape.width, bias=False)

    def leave(self, gate: Tensor, up: Tensor) -> Tensor:
        """From what `gate` and `up` returned, each (B, T, F), to (B, T, D)."""
        return self.down(swiglu(gate, up))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        return self.leave(self.gate(x), self.up(x))


class Block(nn.Module):
    """One transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

    recomputable = ("enter_attention", "mlp.leave")
    """Methods that start with element-wise work and end in one matrix product: selective recomputation keeps their
    inputs and repeats the element-wise part alone. (norm2 is not among them: it feeds two products.)"""

    def __init__(self, shape: Shape, rotary: Rotary) -> None:
        super().__init__()
        self.norm1 = RMSNorm(shape.width, shape.norm_eps)
        self.attn = Attention(shape, bias=False, rotary=rotary)
        self.norm2 = RMSNorm(shape.width, shape.norm_eps)
        self.mlp = MLP(shape)
        self.dropout = nn.Dropout(shape.dropout)

    def enter_attention(self, x: Tensor) -> Tensor:
        """Queries, keys and values of the residual stream: (B, T, D) to (B, T, D + 2·K·S)."""
        return self.attn.qkv(self.norm1(x))  # type: ignore[no-any-return]

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        """The residual stream (B, T, D) after this block; `past` holds the keys and values of earlier tokens."""
        x = x + self.dropout(self.attn(self.enter_attention(x), past))
        return x + self.dropout(self.mlp(self.norm2(x)))  # type: ignore[no-any-return]


class Llama(nn.Module):
    """The whole network. Parameters are not set here: see `layers.initialize`.

    Args:
        shape: all sizes.
    """

    roles = ROLES

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed = nn.Embedding(shape.vocabulary, shape.width)
        self.dropout = nn.Dropout(shape.dropout)
        rotary = Rotary(shape.head_size, shape.sequence, shape.rope_base)
        self.blocks = nn.ModuleList(Block(shape, rotary) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.width, shape.norm_eps)
        self.head = None if shape.tied else Linear(shape.width, shape.vocabulary, bias=False)

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """Token embeddings: (B, T) int64 to (B, T, D). Positions enter in attention."""
        return self.dropout(self.embed(tokens))  # type: ignore[no-any-return]

    def hidden(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """The residual stream (B, T, D) after the last block."""
        x: Tensor = self.embed_tokens(tokens)
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
