"""DoRA on a frozen layer as one function: LoRA between gains, which are those of the inputs or those of the outputs.

    y = W (g x) + s B A (g x) + b    or    y = g (W x + s B A x) + b,  where g = m / |W + s B A|

The norm is a constant (arXiv:2402.09353, section 4.3), so the gradient of m is that of g by the norm. Gains of inputs
keep only x for the backward pass, as LoRA does; those of outputs keep what they are multiplied with too.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from library.layers.flat import GradientSink
from library.layers.frozen import input_gradient_of
from networks.lora_function import add_gradients, lora_output


@dataclass
class DoraSink(GradientSink):
    """Where a layer's backward pass adds the gradients of A, B and m, past autograd."""

    magnitude: Tensor


class DoraFunction(torch.autograd.Function):
    """`apply(x, anchor, down, up, magnitude, norms, layer, scale, on_output, mask_of, sink)`: see `LoraFunction`.

    `magnitude` is m; norms and gains are in fp32, of as many dimensions as the weight.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        anchor: Tensor,
        down: Tensor,
        up: Tensor,
        magnitude: Tensor,
        norms: Tensor,
        layer: nn.Module,
        scale: float,
        on_output: bool,
        mask_of: Callable[[Tensor], Tensor] | None,
        sink: DoraSink | None,
    ) -> Tensor:
        ctx.layer, ctx.scale, ctx.on_output, ctx.sink = layer, scale, on_output, sink
        gain = (magnitude / norms).flatten()
        output, mask = lora_output(x if on_output else scaled(x, gain), down, up, layer, scale, mask_of)
        ctx.save_for_backward(x, down, up, norms, gain, mask, output if on_output else None)
        return scaled(output, gain, layer.bias) if on_output else output

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, down, up, norms, gain, mask, output = ctx.saved_tensors  # unpacked once, as checkpoints demand
        sink, layer, to_input = ctx.sink, ctx.layer, None
        if ctx.on_output:
            gradient, to_gain = scaled_gradients(gradient, output, gain, layer.bias)
        if ctx.needs_input_grad[0] or not ctx.on_output:
            to_input = input_gradient_of(layer, gradient, x.shape)
        if sink is None:
            to_down, to_up = torch.zeros_like(down), torch.zeros_like(up)
        else:
            to_down, to_up = sink.down, sink.up
            sink.mark()
        read = x if ctx.on_output else scaled(x, gain)
        add_gradients(ctx, (read, down, up, mask), gradient, (to_down, to_up, to_input))
        if not ctx.on_output:
            to_input, to_gain = scaled_gradients(to_input, x, gain)
        to_magnitude = to_gain.view_as(norms) / norms
        own = to_down, to_up, to_magnitude
        if sink is not None:
            sink.magnitude.add_(to_magnitude)
            own = None, None, None
        return (to_input if ctx.needs_input_grad[0] else None), None, *own, *[None] * 6


def scaled(values: Tensor, gain: Tensor, shift: Tensor | None = None) -> Tensor:
    """(values - shift) gain + shift by channel, in the dtype of the values; autograd does not know of this."""
    if is_best_as_norm(values):
        mean, variance = means(gain, shift), torch.ones_like(gain)
        bias = None if shift is None else mean
        out = torch.batch_norm(rows(values), gain, bias, mean, variance, False, 0.0, 0.0, False)
        return shaped_as(values, out)
    gain, shift = over_channels(values, gain), None if shift is None else over_channels(values, shift)
    if shift is None:
        return torch.mul(values, gain, out=torch.empty_like(values))
    return torch.addcmul(shift * (1 - gain), values, gain).to(values.dtype)


def scaled_gradients(
    gradient: Tensor, values: Tensor, gain: Tensor, shift: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Those of the values and of the gain, the latter in fp32, where `scaled` has this gradient."""
    if is_best_as_norm(values):
        mean, variance, wanted = means(gain, shift), torch.ones_like(gain), (True, True, False)
        of_values, of_gain, _ = torch.ops.aten.native_batch_norm_backward(
            rows(gradient), rows(values), gain, mean, variance, None, None, False, 0.0, wanted
        )
        return shaped_as(values, of_values), of_gain
    free = values if shift is None else values - over_channels(values, shift)
    channel = 1 if values.ndim == 4 else values.ndim - 1
    of_gain = (gradient * free).sum([axis for axis in range(values.ndim) if axis != channel], dtype=gain.dtype)
    return torch.mul(gradient, over_channels(values, gain), out=torch.empty_like(gradient)), of_gain


def is_best_as_norm(values: Tensor) -> bool:
    """Whether numbers of 16 bits and gains of 32 go faster through a batch norm, as they do on a processor.

    PyTorch multiplies them by way of copies in fp32; its batch norm of given mean and variance takes them as they are.
    """
    return values.device.type == "cpu" and values.dtype != torch.float32


def means(gain: Tensor, shift: Tensor | None) -> Tensor:
    return torch.zeros_like(gain) if shift is None else shift.to(gain.dtype)


def rows(values: Tensor) -> Tensor:
    """With channels second: [rows, C] or [B, C, h, w]."""
    return values if values.ndim == 4 else values.reshape(-1, values.shape[-1])


def shaped_as(values: Tensor, made: Tensor) -> Tensor:
    """What was made of `rows(values)`; the view of a single picture would no longer pass for one with channels last."""
    return made if values.ndim == 4 else made.view(values.shape)


def over_channels(values: Tensor, numbers: Tensor) -> Tensor:
    """One number a channel in a shape that values can be multiplied with."""
    return numbers.view(-1, 1, 1) if values.ndim == 4 else numbers.view(-1)
