"""A frozen layer with a changed weight as one function: y = op(x, W + s D), with D made of small matrices.

Where W is kept in fp32, W + s D is one weight, so that a step has three products as large as the layer: two that the
frozen layer has by itself, and the gradient of D. In 16 bits the sum would lose what of D is small beside W, and other
forms of layers have no weight to add to: there D has two products of its own. Neither D nor what it is made of is kept
for the backward pass.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from library.layers.frozen import input_gradient_of, output_of, product_of
from networks.factored import product_with
from networks.lora_function import convolution_gradients, geometry, rows_of


class WeightFunction(torch.autograd.Function):
    """`apply(x, layer, scale, make, *factors)`, with D = make(*factors) in the shape of W."""

    @staticmethod
    def forward(
        ctx, x: Tensor, layer: nn.Module, scale: float, make: Callable[..., Tensor], *factors: Tensor
    ) -> Tensor:
        ctx.layer, ctx.scale, ctx.make = layer, scale, make
        ctx.save_for_backward(x, *factors)
        change = make(*factors) * scale
        if can_fold(layer, change):
            return output_of(with_weight(layer, change.add_(layer.weight)), x)
        return output_of(layer, x).add_(product_with(x, change, layer))

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, *factors = ctx.saved_tensors
        with torch.enable_grad():
            leaves = [factor.detach().requires_grad_() for factor in factors]
            made = ctx.make(*leaves)
        change = made.detach() * ctx.scale
        of_change = weight_gradient(ctx.layer, gradient, x, change)
        of_factors = torch.autograd.grad(made, leaves, of_change.mul_(ctx.scale))
        of_input = changed_input_gradient(ctx.layer, gradient, x, change) if ctx.needs_input_grad[0] else None
        return of_input, None, None, None, *of_factors


def can_fold(layer: nn.Module, change: Tensor) -> bool:
    """Whether a layer's weight is kept as it is, and the sum with a change loses nothing."""
    weight = layer._parameters.get("weight")
    return weight is not None and weight.dtype == change.dtype == torch.float32


def with_weight(layer: nn.Module, weight: Tensor) -> nn.Module:
    """The layer with another weight."""
    other = copy.copy(layer)
    other._parameters = layer._parameters | {"weight": weight}
    return other


def weight_gradient(layer: nn.Module, gradient: Tensor, x: Tensor, change: Tensor) -> Tensor:
    """That of the whole weight, in its shape."""
    if change.ndim == 2:
        return product_of(layer)(rows_of(gradient).t(), rows_of(x).t())
    return convolution_gradients(gradient, x, change, geometry(layer), wants_input=False)[1]


def changed_input_gradient(layer: nn.Module, gradient: Tensor, x: Tensor, change: Tensor) -> Tensor:
    """That of x."""
    if can_fold(layer, change):
        return input_gradient_of(with_weight(layer, change.add_(layer.weight)), gradient, x.shape)
    of_input = input_gradient_of(layer, gradient, x.shape)
    if change.ndim == 2:
        return of_input.add_(gradient @ change)
    return of_input.add_(nn.grad.conv2d_input(x.shape, change, gradient, *geometry(layer)))
