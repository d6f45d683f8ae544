"""LoRA on several layers that read one tensor, as queries, keys and values do: it is read and kept once for all.

Their matrices A lie one behind the other in memory, so they are one matrix, and so are their gradients.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from library.layers.flat import GradientSink, joined
from library.layers.frozen import (
    Product,
    add_input_gradient_of,
    add_product,
    input_gradient_of,
    output_of,
    product_of,
)
from networks.lora_function import rows_of


class Lora(Protocol):
    """What is asked here of a LoRA adapter."""

    base: nn.Module
    lora_up: nn.Module
    scale: float
    multiplier: float
    dropout: float | None
    rank_dropout: float | None
    flat: tuple[Tensor, Tensor, GradientSink] | None  # A, B and where their gradients go
    shared: "SharedInput | None"


def share_input(adapters: Sequence[Lora]) -> None:
    """Have adapters compute together, if they can: plain ones of one rank, all in the buffers."""
    flat = [adapter.flat for adapter in adapters]
    are_plain = all(adapter.flat and not (adapter.dropout or adapter.rank_dropout) for adapter in adapters)
    if len(adapters) < 2 or not are_plain:
        return
    downs, gradients = joined([down for down, _, _ in flat]), joined([sink.down for _, _, sink in flat])
    if downs is None or gradients is None:
        return
    shared = SharedInput(adapters, downs, gradients)
    for adapter in adapters:
        adapter.shared = shared


class SharedInput:
    """The outputs of layers for one tensor; the first that is called computes those of all."""

    def __init__(self, adapters: Sequence[Lora], downs: Tensor, down_gradients: Tensor):
        self.adapters = list(adapters)
        self.downs, self.down_gradients = downs, down_gradients  # [n rank, in]
        self._input: Tensor | None = None
        self._outputs: dict[Lora, Tensor] = {}

    @property
    def product(self) -> Product:
        return product_of(self.adapters[0].base)

    def output(self, adapter: Lora, x: Tensor) -> Tensor:
        """What the layer of an adapter gives for x, with the adapter's change."""
        if x is not self._input or adapter not in self._outputs:
            outputs = SharedInputFunction.apply(x, adapter.lora_up.weight, self)
            self._input, self._outputs = x, dict(zip(self.adapters, outputs, strict=True))
        output = self._outputs.pop(adapter)
        if not self._outputs:
            self._input = None
        return output


class SharedInputFunction(torch.autograd.Function):
    """`apply(x, anchor, shared)`: see `LoraFunction`; gradients go to the sinks alone."""

    @staticmethod
    def forward(ctx, x: Tensor, anchor: Tensor, shared: SharedInput) -> tuple[Tensor, ...]:
        ctx.shared = shared
        ctx.scales = [adapter.scale * adapter.multiplier for adapter in shared.adapters]
        ctx.save_for_backward(x)
        outputs = []
        for adapter, scale, hidden in zip(shared.adapters, ctx.scales, hidden_of_each(x, shared), strict=True):
            output = output_of(adapter.base, x)
            add_product(output, hidden, adapter.flat[1], scale, shared.product)
            outputs.append(output)
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, None, None]:
        (x,), shared = ctx.saved_tensors, ctx.shared
        of_hidden = x.new_empty(x.numel() // x.shape[-1], len(shared.downs))  # [rows, n rank], scaled
        hidden, parts = hidden_of_each(x, shared), of_hidden.chunk(len(shared.adapters), dim=1)
        for adapter, scale, gradient, own_hidden, part in zip(
            shared.adapters, ctx.scales, gradients, hidden, parts, strict=True
        ):
            _, up, sink = adapter.flat
            torch.mul(shared.product(rows_of(gradient), up.t()), scale, out=part)
            sink.up.addmm_(rows_of(gradient).t(), own_hidden, alpha=scale)
            sink.mark()
        shared.down_gradients.addmm_(of_hidden.t(), rows_of(x))
        if not ctx.needs_input_grad[0]:
            return None, None, None
        layers = [adapter.base for adapter in shared.adapters]
        of_input = input_gradient_of(layers[0], gradients[0], x.shape)
        for layer, gradient in zip(layers[1:], gradients[1:], strict=True):
            add_input_gradient_of(layer, gradient, of_input)
        add_product(of_input, of_hidden, shared.downs.t(), 1.0, shared.product)
        return of_input, None, None


def hidden_of_each(x: Tensor, shared: SharedInput) -> tuple[Tensor, ...]:
    """A(x) of every adapter, [rows, rank] each."""
    return shared.product(rows_of(x), shared.downs).chunk(len(shared.adapters), dim=1)
