"""What both model families are made of: attention, rotary positions, the key/value cache and initial weights.

Shapes: B samples, T tokens, D width, H query heads, K key/value heads, S head size.
Nothing here knows about ranks. A tensor-parallel scheme may replace `qkv` and `proj` by shards of themselves;
attention then finds fewer heads in what `qkv` returns. Context parallelism replaces `Attention.attend`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tozan.models.arithmetic import Shape
from tozan.ops import attention, causal_attention, layer_norm, linear, rms_norm, rotate, split_heads


class Unfilled(TorchFunctionMode):
    """Within it, modules do not draw the initial values that PyTorch has for them.

    For those on the meta device, which hold none: to draw them there imports PyTorch's compiler, a second and more.
    """

    def __torch_function__(
        self, function: Callable[..., Any], _types: Any, args: tuple[Any, ...] = (), options: Any = None
    ) -> Any:
        """Calls the function, or returns the tensor that it was to fill."""
        options = options or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else options["tensor"]
        return function(*args, **options)


class Past:
    """Keys and values that one attention layer has seen, in buffers of fixed size.

    Args:
        capacity: most tokens it can hold.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Appends the keys and values of new tokens, each (B, K, T, S).

        Returns:
            Keys and values of all tokens so far, (B, K, length, S): views of the buffers, not copies.

        Raises:
            ValueError: the tokens do not fit.
        """
        end = self.length + keys.shape[2]
        if end > self.capacity:
            raise ValueError(f"cache holds {self.capacity} tokens; {self.length} + {keys.shape[2]} do not fit")
        if self._keys is None or self._values is None:
            size = (keys.shape[0], keys.shape[1], self.capacity, keys.shape[3])
            self._keys, self._values = keys.new_empty(size), values.new_empty(size)
        self._keys[:, :, self.length : end] = keys
        self._values[:, :, self.length : end] = values
        self.length = end
        return self._keys[:, :, :end], self._values[:, :, :end]


class Cache:
    """The key/value cache of a whole model: one `Past` per block, all of the same length.

    Args:
        layers: number of blocks.
        capacity: most tokens it can hold.
    """

    def __init__(self, layers: int, capacity: int) -> None:
        self.blocks = [Past(capacity) for _ in range(layers)]

    @property
    def length(self) -> int:
        """Tokens seen so far."""
        return self.blocks[0].length


class Rotary(nn.Module):
    """Rotary position embedding (RoFormer, arXiv 2104.09864), pairing element i with i + S/2 as LLaMA's weights do.

    Args:
        head_size: S, even.
        length: longest sequence.
        base: base of the frequencies.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, head_size: int, length: int, base: float) -> None:
        super().__init__()
        # On the CPU even inside `torch.device("meta")`: the tables are no parameters, nobody fills them in later.
        exponents = torch.arange(0, head_size, 2, dtype=torch.float32, device="cpu") / head_size
        angles = torch.outer(torch.arange(length, dtype=torch.float32, device="cpu"), 1.0 / base**exponents)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Tensor, turned: int, start: int = 0) -> Tensor:
        """Rotates the first `turned` heads of x (B, T, heads, S), whose first token stands at position `start`."""
        rows = slice(start, start + x.shape[1])
        return rotate(x, self.cos[rows], self.sin[rows], turned)


class LayerNorm(nn.LayerNorm):
    """A norm whose result has the type of the product that follows: `ops.layer_norm`."""

    def forward(self, x: Tensor) -> Tensor:
        """(…, D) to (…, D)."""
        return layer_norm(x, self.weight, self.bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """Likewise: `ops.rms_norm`."""

    eps: float

    def forward(self, x: Tensor) -> Tensor:
        """(…, D) to (…, D)."""
        return rms_norm(x, self.weight, self.eps)


class Linear(nn.Linear):
    """A linear layer that makes its products by `ops.linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) to (…, out)."""
        return linear(x, self.weight, self.bias)


class Attention(nn.Module):
    """Causal self-attention, with as many key/value heads as the shape says (grouped-query, arXiv 2305.13245).

    Args:
        shape: the model's sizes.
        bias: whether the two linear layers have one.
        rotary: rotates queries and keys; None leaves positions to the embedding.
    """

    def __init__(self, shape: Shape, bias: bool, rotary: Rotary | None = None) -> None:
        super().__init__()
        self.head_size = shape.head_size
        self.group = shape.heads // shape.kv_heads
        self.rotary = rotary
        self.qkv = Linear(shape.width, shape.width + 2 * shape.kv_width, bias=bias)
        self.proj = Linear(shape.width, shape.width, bias=bias)
        self.attend: Callable[[Tensor, Tensor, Tensor], Tensor] = attend

    def forward(self, qkv: Tensor, past: Past | None = None) -> Tensor:
        """Attends, given what `qkv` returned.

        Args:
            qkv: queries, keys and values side by side, (B, T, (H + 2K)·S); of some heads only, on a shard.
            past: keys and values of earlier tokens; this call's are appended.

        Returns:
            (B, T, D).
        """
        batch, tokens, width = qkv.shape
        kv_heads = width // self.head_size // (self.group + 2)
        heads = qkv.view(batch, tokens, -1, self.head_size)
        if self.rotary is not None:
            heads = self.rotary(heads, (self.group + 1) * kv_heads, past.length if past else 0)
        q, k, v = split_heads(heads.transpose(1, 2), [self.group * kv_heads, kv_heads, kv_heads])
        if past is not None:
            k, v = past.extend(k, v)
        y = self.attend(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(batch, tokens, -1))  # type: ignore[no-any-return]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of the newest T tokens over all L ≥ T tokens.

    Args:
        q: (B, H, T, S), the last T of the L tokens.
        k: (B, K, L, S), where K divides H.
        v: (B, K, L, S).

    Returns:
        (B, H, T, S).
    """
    tokens, length = q.shape[2], k.shape[2]
    grouped = q.shape[1] != k.shape[1]
    if tokens == length and attention.pays(q):
        return causal_attention(q, k, v)
    if tokens == length or tokens == 1:
        return F.scaled_dot_product_attention(q, k, v, is_causal=tokens == length > 1, enable_gqa=grouped)
    # `is_causal` would line the mask up with the first token instead of the last.
    mask = torch.ones(tokens, length, dtype=torch.bool, device=q.device).tril(length - tokens)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)


def initial(shape: Shape, name: str, size: torch.Size, seed: int) -> Tensor:
    """The first value of a parameter: a function of seed, name and global size, so that every layout starts alike.

    GPT-2's scheme: matrices and embeddings from a normal distribution of deviation 0.02, those that write into the
    residual stream divided by √(2·layers); norms one, biases zero.

    Args:
        shape: the model's sizes (for the number of residual branches).
        name: the parameter's full name, such as `blocks.3.attn.qkv.weight`.
        size: its global size.
        seed: the run's seed.

    Returns:
        An fp32 tensor on the CPU.
    """
    if name.endswith("bias"):
        return torch.zeros(size)
    if len(size) == 1:
        return torch.ones(size)
    residual = name.endswith(("attn.proj.weight", "mlp.proj.weight", "mlp.down.weight"))
    deviation = 0.02 / math.sqrt(2 * shape.layers) if residual else 0.02
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.empty(size).normal_(0.0, deviation, generator=generator)


def initialize(model: nn.Module, shape: Shape, seed: int) -> None:
    """Gives every parameter its initial value; parameters on the meta device become real, on the CPU."""
    for prefix, module in model.named_modules():
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            value = initial(shape, f"{prefix}.{leaf}", parameter.shape, seed)
            setattr(module, leaf, nn.Parameter(value))
