"""What training asks of a frozen layer: its output, and the gradient of its input. Its weights have no gradient.

So a layer may hold its weights in any form: as they are, in 8 bits, ordered as a processor reads them. Adapters call
the functions at the end of this file and need not know which.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Product = Callable[[Tensor, Tensor], Tensor]


class FrozenLayer(nn.Module):
    """A Linear or Conv2d with weights in a form of its own; a subclass is also one of these two."""

    product = staticmethod(F.linear)  # x weight^T, in the way that is fastest where the layer is

    def output(self, x: Tensor) -> Tensor:
        """What the layer makes of x, with its bias, in new memory."""
        raise NotImplementedError

    def input_gradient(self, gradient: Tensor, shape: torch.Size) -> Tensor:
        """The gradient of an input of this shape, from that of the output, in new memory."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return Frozen.apply(x, self)


class Frozen(torch.autograd.Function):
    """A frozen layer's output; for the backward pass nothing is kept."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: FrozenLayer) -> Tensor:
        ctx.layer, ctx.shape, ctx.dtype = layer, x.shape, x.dtype
        return layer.output(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.layer.input_gradient(gradient, ctx.shape).to(ctx.dtype), None


def make_plain(layer: nn.Module) -> None:
    """Have a layer hold its weight as it computes with it, so that the weight can be changed."""
    if "weight" not in layer._parameters:
        weight = layer.weight
        for name in layer._parameters.keys() - {"bias"}:
            delattr(layer, name)
        layer.__class__ = nn.Linear if isinstance(layer, nn.Linear) else nn.Conv2d
        layer.weight = nn.Parameter(weight, requires_grad=False)


def is_adapted(layer: nn.Module) -> bool:
    """Whether something, such as an adapter, stands in the layer's place."""
    return "forward" in vars(layer)


def conv2d_input_gradient(layer: nn.Conv2d, weight: Tensor, gradient: Tensor, shape: torch.Size) -> Tensor:
    """The gradient of the input of a convolution with this weight and the layer's geometry."""
    return nn.grad.conv2d_input(shape, weight, gradient, layer.stride, layer.padding, layer.dilation, layer.groups)


def output_of(layer: nn.Module, x: Tensor) -> Tensor:
    """What a Linear or Conv2d makes of x; `forward` may be replaced, this is the layer itself.

    For functions that have a backward pass of their own: autograd may not see into this.
    """
    if isinstance(layer, FrozenLayer):
        return layer.output(x)
    if isinstance(layer, nn.Linear):
        return F.linear(x, layer.weight, layer.bias)
    return layer._conv_forward(x, layer.weight, layer.bias)


def input_gradient_of(layer: nn.Module, gradient: Tensor, shape: torch.Size) -> Tensor:
    """The gradient of the layer's input, which has this shape."""
    if isinstance(layer, FrozenLayer):
        return layer.input_gradient(gradient, shape)
    if isinstance(layer, nn.Linear):
        return gradient @ layer.weight
    return conv2d_input_gradient(layer, layer.weight, gradient, shape)


def add_input_gradient_of(layer: nn.Module, gradient: Tensor, to: Tensor) -> None:
    """Add the gradient of a Linear layer's input to a tensor of its shape."""
    if isinstance(layer, FrozenLayer):
        to.add_(layer.input_gradient(gradient, to.shape))
    else:
        to.view(-1, to.shape[-1]).addmm_(gradient.reshape(-1, gradient.shape[-1]), layer.weight)


def product_of(layer: nn.Module) -> Product:
    """How products of matrices beside a layer are best computed: x weight^T of the two."""
    return layer.product if isinstance(layer, FrozenLayer) else F.linear


def add_product(to: Tensor, x: Tensor, weight: Tensor, scale: float, product: Product) -> None:
    """Add scale x weight^T [rows, out] to `to`, whose last dimension is `out`."""
    if product is F.linear:
        to.view(-1, to.shape[-1]).addmm_(x, weight.t(), alpha=scale)
    else:
        to.view(-1, to.shape[-1]).add_(product(x, weight), alpha=scale)
