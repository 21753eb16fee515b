"""Linear layers whose weight gradient can wait: what zero-bubble schedules split the backward pass with.

The backward pass of y = x·Wᵀ + b makes two products. The input's gradient is what the previous pipeline stage waits
for; nobody waits for the weight's. While a `WeightGradients` is deferring, layers bound to it make the first at once
and leave the second, with the tensors that it needs, to `finish`. Both are the products that autograd would run, on
the same operands, and gradients are added up in the order of `finish` calls: the bits are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tozan.ops import products
from tozan.ops.compiler import beginning
from tozan.ops.products import bias_gradient, compute_dtype
from tozan.parallel.summa import Grid, product_nn, product_nt, product_tn
from tozan.parallel.tensor_1d import ColumnParallelLinear, RowParallelLinear
from tozan.parallel.tensor_2d import SummaLinear


class Products(Protocol):
    """The three products of a linear layer, none of which tracks gradients; x is (…, in), dy (N, out).

    x and dy are in the compute type, weight and bias may be in another.
    """

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x·Wᵀ + b."""

    def input_gradient(self, dy: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """dy·W in the type `dtype`."""

    def weight_gradient(self, dy: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
        """dyᵀ·x in the type `dtype`."""


class LocalProducts:
    """Those of one rank's own operands."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x·Wᵀ + b."""
        return products.forward(x, weight, bias, x.dtype)

    def input_gradient(self, dy: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """dy·W."""
        return products.input_gradient(dy, weight, dy.dtype, dtype)

    def weight_gradient(self, dy: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
        """dyᵀ·x."""
        return products.weight_gradient(dy, x, dy.dtype, dtype)


class SummaProducts:
    """Those of blocks on a grid, where W is stored as the transpose of SUMMA's block."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x·Wᵀ + b."""
        y = product_nn(x, weight.to(x.dtype).T, self._grid)
        return y if bias is None else y + bias.to(x.dtype)

    def input_gradient(self, dy: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """dy·W."""
        return product_nt(dy, weight.to(dy.dtype).T, self._grid).to(dtype)

    def weight_gradient(self, dy: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
        """dyᵀ·x."""
        return product_tn(x, dy, self._grid).T.to(dtype)


LOCAL = LocalProducts()


class WeightGradients:
    """The products that wait."""

    def __init__(self) -> None:
        self._waiting: dict[Hashable, list[Callable[[], None]]] = {}
        self._deferring: Hashable | None = None

    def bind(self, model: nn.Module) -> None:
        """Makes the linear layers of a model able to wait; `forward` stays the same to the bit."""
        for module in model.modules():
            if isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
                module.product = self.linear
            elif isinstance(module, SummaLinear):
                module.product = partial(self.linear, products=SummaProducts(module.grid))
            elif isinstance(module, nn.Linear):
                module.forward = partial(_forward, module, self)  # type: ignore[method-assign]

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, products: Products = LOCAL) -> Tensor:
        """`F.linear`, whose weight gradient waits if `begin` was called by the time of its backward pass."""
        dtype = compute_dtype(x)
        return _Linear.apply(x, weight, bias, self, products, dtype)  # type: ignore[no-any-return, no-untyped-call]

    def begin(self, key: Hashable) -> None:
        """From now on weight gradients wait, under this key."""
        self._deferring = key
        self._waiting[key] = []

    def end(self) -> None:
        """From now on weight gradients are made at once."""
        self._deferring = None

    def finish(self, key: Hashable) -> None:
        """Makes the weight gradients that wait under a key, and adds them to the parameters' `.grad`."""
        for product in self._waiting.pop(key):
            product()

    def defer(self, product: Callable[[], None]) -> bool:
        """Takes a product if it may wait; False if it must be made now."""
        if self._deferring is None:
            return False
        self._waiting[self._deferring].append(product)
        return True


def _forward(module: nn.Linear, gradients: WeightGradients, x: Tensor) -> Tensor:
    return gradients.linear(x, module.weight, module.bias)


class _Linear(torch.autograd.Function):
    """y = x·Wᵀ + b."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gradients: WeightGradients,
        products: Products,
        dtype: torch.dtype,
    ) -> Tensor:
        """The product in `dtype`; keeps x in that type, and the weight as it is."""
        ctx.x_dtype, ctx.gradients, ctx.products = x.dtype, gradients, products
        ctx.bias_dtype = None if bias is None else bias.dtype
        x = x.to(dtype)
        ctx.save_for_backward(x, weight)
        ctx.leaf = weight
        with torch.autocast(x.device.type, enabled=False):
            return products.forward(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor | None, Tensor | None, None, None, None]:
        """The input's gradient, and the weight's unless it waits."""
        x, weight = ctx.saved_tensors
        dy = gradients[0].flatten(0, -2)
        dx = ctx.products.input_gradient(dy, weight, ctx.x_dtype).view(x.shape)
        db = None if ctx.bias_dtype is None else bias_gradient(dy, ctx.bias_dtype)
        leaf, products = ctx.leaf, ctx.products

        def product() -> Tensor:
            made: Tensor = products.weight_gradient(dy, x.flatten(0, -2), weight.dtype)
            return made

        def later() -> None:
            beginning(leaf, product()).backward()  # type: ignore[no-untyped-call]  # adds to `.grad`, and calls whoever waits for it

        waits = ctx.needs_input_grad[1] and ctx.gradients.defer(later)
        dw = product() if ctx.needs_input_grad[1] and not waits else None
        return dx, dw, db, None, None, None
