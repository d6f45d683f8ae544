"""Tensors that the backward pass makes again instead of keeping them (arXiv:1604.06174), whoever it is that needs them.

A layer keeps its input for the gradients of its adapter. Where that input came out of something cheap, such as a norm,
it can be made again from what the norm keeps anyway. `MadeAgain` does so without the layer's knowing.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class MadeAgain:
    """A tensor by what makes it: `make` gives it again at any later time, value for value and stride for stride."""

    def __init__(self, make: Callable[[], Tensor]):
        self._make = make
        self._value: Tensor | None = None

    def value(self) -> Tensor:
        """The tensor, made at the first call and then held until `forget`."""
        if self._value is None:
            with torch.no_grad():
                self._value = self._make()
        return self._value

    def forget(self) -> None:
        """Let the tensor go."""
        self._value = None

    def then(self, function: Callable[[Tensor], Tensor]) -> "MadeAgain":
        """What a function makes of the tensor."""
        return MadeAgain(lambda: function(self.value()))

    def instead_of(self, tensor: Tensor) -> saved_tensors_hooks:
        """A context in which autograd, wherever it would keep the tensor or a view of all of it, keeps this instead.

        Contexts of this kind do not nest, and checkpointing is one: the inner one alone has an effect.
        """
        size, storage, version = tensor.numel(), tensor.untyped_storage()._cdata, tensor._version

        def pack(kept: Tensor) -> Any:
            if kept.numel() != size or kept.untyped_storage()._cdata != storage or kept._version != version:
                return kept
            return kept.shape, kept.stride(), kept.storage_offset()

        def unpack(packed: Any) -> Tensor:
            return packed if isinstance(packed, Tensor) else self.value().as_strided(*packed)

        return saved_tensors_hooks(pack, unpack)


def forget(ctx: Any) -> None:
    """Let go of `ctx.recipe`, that of a function's result, in its backward pass: all that use it have had theirs."""
    if ctx.recipe:
        ctx.recipe.forget()
        ctx.recipe = None  # it holds the function's input
