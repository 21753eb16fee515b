"""What torch.compile is told of our functions, without importing it where nothing is compiled.

`torch.compiler.disable` and the operations of `torch.library.custom_op` import the compiler when they are made or
first called: 1,000 modules and more than a second of every process's start.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

P = ParamSpec("P")
T = TypeVar("T")


def eager(function: Callable[P, T]) -> Callable[P, T]:
    """Decorates a function that compiled code is to call as it is, with everything that it calls."""

    @functools.wraps(function)
    def call(*arguments: P.args, **options: P.kwargs) -> T:
        if torch.compiler.is_compiling():
            disable: Callable[..., Callable[P, T]] = torch.compiler.disable
            return disable(function)(*arguments, **options)
        return function(*arguments, **options)

    return call


class Operation(Generic[P, T]):
    """A function of tensors that PyTorch takes for one operation, as those of `torch.library.custom_op`.

    Args:
        name: `namespace::name`.
        function: computes the results, which share no memory with the arguments, and changes none of these.
    """

    def __init__(self, name: str, function: Callable[P, T]) -> None:
        functools.update_wrapper(self, function)
        self._name = name
        schema = torch.library.infer_schema(function, mutates_args=())
        torch.library.define(name, schema, tags=[torch.Tag.pt2_compliant_tag])
        torch.library.impl(name, "default", function)
        namespace, _, own = name.partition("::")
        self._call: Callable[P, T] = getattr(getattr(torch.ops, namespace), own)

    def __call__(self, *arguments: P.args, **options: P.kwargs) -> T:
        """What PyTorch makes of a call."""
        return self._call(*arguments, **options)

    def register_fake(self, function: Callable[P, T]) -> Callable[P, T]:
        """Decorates the function that gives results of the right shapes without computing them."""
        torch.library.register_fake(self._name, function)
        return function

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
        """The gradients: `setup_context(ctx, inputs, output)` keeps what `backward(ctx, *gradients)` needs."""
        torch.library.register_autograd(self._name, backward, setup_context=setup_context)


def operation(name: str) -> Callable[[Callable[P, T]], Operation[P, T]]:
    """Decorates the function of an `Operation`."""
    return functools.partial(Operation, name)


def beginning(y: Tensor, gradient: Tensor) -> Tensor:
    """A number whose backward pass is that of `y`, begun with `gradient`.

    Given such a gradient itself, `torch.autograd` compares shapes by the compiler's library for symbols.
    """
    with torch.enable_grad():
        return _Beginning.apply(y, gradient.detach())  # type: ignore[no-any-return, no-untyped-call]


class _Beginning(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, gradient: Tensor) -> Tensor:
        ctx.gradient = gradient
        return y.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.__dict__.pop("gradient"), None
