"""LoKr on a frozen layer as one function: y = f(x) + s (C (x) D) x, with f the layer, s a number, D = U V or whole.

The change is V on each of the c parts of x, a sum of these with the weights C, and U on each of the a parts of that.
Its backward pass makes again what is between them instead of keeping it, and never the Kronecker product.

x [..., c d], C [a, c], V [rank, d], U [b, rank] for a Linear; x [N, c d, H, W], V [rank, d, k, k] with the geometry of
the layer for a convolution. Without U, V is D, and its rank is b. All are of one dtype.
"""

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.layers.frozen import Product, input_gradient_of, output_of, product_of
from networks.lora_function import convolution_gradients, geometry

Parts = tuple[Tensor, Tensor, Tensor | None]  # C, V and U


class KroneckerFunction(torch.autograd.Function):
    """`apply(x, layer, scale, first, down, up)`, the last three C, V and U."""

    @staticmethod
    def forward(
        ctx, x: Tensor, layer: nn.Module, scale: float, first: Tensor, down: Tensor, up: Tensor | None
    ) -> Tensor:
        ctx.layer, ctx.scale = layer, scale
        ctx.save_for_backward(x, first, down, up)
        output = output_of(layer, x)
        return output.add_(kronecker_change(x, (first, down, up), layer, product_of(layer)), alpha=scale)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, first, down, up = ctx.saved_tensors
        layer, wants_input = ctx.layer, ctx.needs_input_grad[0]
        parts = parts_of(x, first.shape[1])
        hidden = hidden_of(parts, down, layer, product_of(layer))
        of_mixed, of_up = parts_of(gradient, len(first)), None
        if up is not None:
            mixed = (first @ grouped(hidden, first.shape[1])).view(len(of_mixed), *hidden.shape[1:])
            of_mixed, of_up = up_gradients(of_mixed, mixed, up, layer)
            of_up.mul_(ctx.scale)
        of_mixed = grouped(of_mixed, len(first)) * ctx.scale
        of_first = torch.tensordot(of_mixed, grouped(hidden, first.shape[1]), ([0, 2], [0, 2]))
        of_hidden = (first.t() @ of_mixed).view(hidden.shape)
        of_input, of_down = down_gradients(of_hidden, parts, down, layer, wants_input)
        if wants_input:
            of_input = input_gradient_of(layer, gradient, x.shape).add_(of_input.reshape(x.shape))
        return of_input, None, None, of_first, of_down, of_up


def kronecker_change(x: Tensor, factors: Parts, layer: nn.Module, product: Product) -> Tensor:
    """(C (x) U V) x; autograd knows all of it where the product is F.linear."""
    first, down, up = factors
    hidden = hidden_of(parts_of(x, first.shape[1]), down, layer, product)
    mixed = (first @ grouped(hidden, first.shape[1])).view(-1, *hidden.shape[1:])
    if up is None:
        changed = mixed
    elif down.ndim == 2:
        changed = product(mixed, up)
    else:
        changed = (up @ mixed.flatten(2)).view(len(mixed), -1, *mixed.shape[2:])
    if down.ndim == 2:
        return changed.view(*x.shape[:-1], -1)
    return changed.reshape(len(x), -1, *changed.shape[2:])


def parts_of(x: Tensor, count: int) -> Tensor:
    """The parts of what a layer reads or gives, one after the other: [rows count, in / count, ...]."""
    if x.ndim == 4:
        return x.reshape(len(x) * count, -1, *x.shape[2:])
    return x.reshape(-1, x.shape[-1] // count)


def grouped(parts: Tensor, count: int) -> Tensor:
    """[rows, count, numbers of a part]."""
    return parts.reshape(-1, count, prod(parts.shape[1:]))


def hidden_of(parts: Tensor, down: Tensor, layer: nn.Module, product: Product) -> Tensor:
    """V of each part."""
    return product(parts, down) if down.ndim == 2 else F.conv2d(parts, down, None, *geometry(layer))


def up_gradients(gradient: Tensor, mixed: Tensor, up: Tensor, layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Of what U is given, and of U."""
    if gradient.ndim == 2:
        return product_of(layer)(gradient, up.t()), gradient.t() @ mixed
    gradient = gradient.flatten(2)
    of_up = torch.einsum("nbp,nrp->br", gradient, mixed.flatten(2))
    return (up.t() @ gradient).view(mixed.shape), of_up


def down_gradients(
    gradient: Tensor, parts: Tensor, down: Tensor, layer: nn.Module, wants_input: bool
) -> tuple[Tensor | None, Tensor]:
    """Of the parts, where wanted, and of V."""
    if gradient.ndim == 4:
        return convolution_gradients(gradient, parts, down, geometry(layer), wants_input)
    return product_of(layer)(gradient, down.t()) if wants_input else None, gradient.t() @ parts
