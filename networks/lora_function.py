"""LoRA on a frozen layer as one function: y = f(x) + s B(m * A(x)), with f the layer, s a number and m a mask or none.

Its backward pass computes A(x) again instead of keeping it (as arXiv:2312.03415 finds best for small ranks), never
forms B A, and adds its two products to what the frozen layer gives, so that a layer costs no operation on tensors as
large as its output beyond the products themselves.

x [..., in], A [rank, in], B [out, rank] for a Linear; x [N, C, H, W], A [rank, C, k, k], B [out, rank, 1, 1] for a
convolution, where A has the geometry of the layer. All are of one dtype.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.layers.flat import GradientSink
from library.layers.frozen import add_product, input_gradient_of, output_of, product_of

Saved = tuple[Tensor, Tensor, Tensor, Tensor | None]  # x, A, B and the mask

POINTWISE = (1, 1), (0, 0), (1, 1)  # stride, padding and dilation of B


class LoraFunction(torch.autograd.Function):
    """`apply(x, anchor, down, up, layer, scale, mask_of, sink)`.

    With a sink, gradients go there and none to `down` and `up`, which need not ask for any; `anchor` is any tensor
    that does, so that autograd comes by. `mask_of` makes the mask for A(x).
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        anchor: Tensor,
        down: Tensor,
        up: Tensor,
        layer: nn.Module,
        scale: float,
        mask_of: Callable[[Tensor], Tensor] | None,
        sink: GradientSink | None,
    ) -> Tensor:
        ctx.layer, ctx.scale, ctx.sink = layer, scale, sink
        output, mask = lora_output(x, down, up, layer, scale, mask_of)
        ctx.save_for_backward(x, down, up, mask)
        return output

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        saved, sink = ctx.saved_tensors, ctx.sink  # unpacked once, as checkpoints demand
        x, down, up, _ = saved
        if sink is None:
            to_down, to_up = torch.zeros_like(down), torch.zeros_like(up)
        else:
            to_down, to_up = sink.down, sink.up
            sink.mark()
        input_gradient = input_gradient_of(ctx.layer, gradient, x.shape) if ctx.needs_input_grad[0] else None
        add_gradients(ctx, saved, gradient, (to_down, to_up, input_gradient))
        own = (to_down, to_up) if sink is None else (None, None)
        return input_gradient, None, *own, None, None, None, None


def lora_output(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    layer: nn.Module,
    scale: float,
    mask_of: Callable[[Tensor], Tensor] | None,
) -> tuple[Tensor, Tensor | None]:
    """y in new memory, and the mask."""
    output = output_of(layer, x)
    hidden = hidden_of(x, down, layer)
    mask = mask_of and mask_of(hidden)
    hidden = masked(hidden, mask)
    if down.ndim == 2:
        add_product(output, rows_of(hidden), up, scale, product_of(layer))
        return output, mask
    return output.add_(F.conv2d(hidden, up), alpha=scale), mask


def add_gradients(ctx, saved: Saved, gradient: Tensor, to: tuple[Tensor, Tensor, Tensor | None]) -> None:
    """Add those of A, B and, where wanted, of x; `ctx` has layer and scale."""
    add = add_linear_gradients if saved[1].ndim == 2 else add_convolution_gradients
    add(ctx, saved, gradient, to)


def add_linear_gradients(ctx, saved: Saved, gradient: Tensor, to: tuple[Tensor, Tensor, Tensor | None]) -> None:
    """Add those of A, B and, where wanted, of x."""
    x, down, up, mask = saved
    to_down, to_up, to_input = to
    hidden = rows_of(masked(hidden_of(x, down, ctx.layer), mask))
    product = product_of(ctx.layer)
    of_hidden = rows_of(masked(product(gradient, up.t()), mask))
    to_up.addmm_(rows_of(gradient).t(), hidden, alpha=ctx.scale)
    to_down.addmm_(of_hidden.t(), rows_of(x), alpha=ctx.scale)
    if to_input is not None:
        add_product(to_input, of_hidden, down.t(), ctx.scale, product)


def add_convolution_gradients(ctx, saved: Saved, gradient: Tensor, to: tuple[Tensor, Tensor, Tensor | None]) -> None:
    """Add those of A, B and, where wanted, of x."""
    x, down, up, mask = saved
    to_down, to_up, to_input = to
    hidden = masked(hidden_of(x, down, ctx.layer), mask)
    of_hidden, of_up = convolution_gradients(gradient, hidden, up, POINTWISE, wants_input=True)
    of_hidden = masked(of_hidden, mask)
    of_input, of_down = convolution_gradients(of_hidden, x, down, geometry(ctx.layer), to_input is not None)
    to_up.add_(of_up, alpha=ctx.scale)
    to_down.add_(of_down, alpha=ctx.scale)
    if to_input is not None:
        to_input.add_(of_input, alpha=ctx.scale)


def convolution_gradients(
    gradient: Tensor, x: Tensor, weight: Tensor, geometry: tuple, wants_input: bool
) -> tuple[Tensor | None, Tensor]:
    """Of the input, where wanted, and of the weight of a convolution without bias."""
    wanted = wants_input, True, False
    of_input, of_weight, _ = torch.ops.aten.convolution_backward(
        gradient, x, weight, None, *geometry, False, (0, 0), 1, wanted
    )
    return of_input, of_weight


def hidden_of(x: Tensor, down: Tensor, layer: nn.Module) -> Tensor:
    """A(x): [..., rank] or [N, rank, h, w]."""
    return product_of(layer)(x, down) if down.ndim == 2 else F.conv2d(x, down, None, *geometry(layer))


def geometry(layer: nn.Conv2d) -> tuple:
    return layer.stride, layer.padding, layer.dilation


def masked(hidden: Tensor, mask: Tensor | None) -> Tensor:
    return hidden if mask is None else hidden * mask


def rows_of(x: Tensor) -> Tensor:
    """[rows, features]; a copy where x lies in memory so that it must be one."""
    return x.reshape(-1, x.shape[-1])
