"""DoRA (arXiv:2402.09353): a LoRA whose changed weight has norms that are learned apart from its direction.

W' = m (W + s B A) / |W + s B A|, with the norms taken over the weights of each input (`dora_scale` [1, in, ...]), or of
each output ([out, 1, ...]). What divides is taken as a constant in the backward pass (section 4.3). So W' x is the LoRA
of x times m / |...|, or that many times the LoRA of x, and

    |W + s B A|^2 = |W|^2 + 2 s W.(B A) + s^2 |B A|^2

costs what a LoRA costs for as many rows as its rank; nothing as large as W is made.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from library.families.base import AdapterTarget
from library.layers.flat import Collected, Sink
from library.layers.frozen import input_gradient_of
from networks.base import Adapter
from networks.lora_function import LoraFunction, add_gradients, lora_output


class Decomposed(Adapter):
    """What makes DoRA of the adapter behind it in the order of inheritance, which has A and B as LoRA has them."""

    def __init__(self, target: AdapterTarget, *args, on_output: bool = False, **kwargs):
        super().__init__(target, *args, **kwargs)
        self.input = None  # what it computes with is its own
        self.on_output = on_output
        self._squares: Tensor | None = None  # |W|^2 in fp32, in the shape of dora_scale
        weight = target.layer.weight
        shape = [1] * weight.ndim
        axis = 0 if on_output else 1
        shape[axis] = weight.shape[axis]
        self.dora_scale = nn.Parameter(torch.ones(shape))
        if not weight.is_meta:
            self.dora_scale.data.copy_(self._base_squares(torch.device("cpu")).sqrt())

    def _apply(self, fn, recurse: bool = True):
        """Norms stay in fp32: their changes are small beside them."""
        kept = self.dora_scale.data
        super()._apply(fn, recurse)
        self.dora_scale.data = kept.to(self.dora_scale.device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        is_plain = self.is_stacked or torch.is_autocast_enabled(x.device.type) or torch.compiler.is_compiling()
        if is_plain or self.multiplier != 1:
            return Adapter.forward(self, x)
        if self._is_dropped():
            return self.base_output(x)
        down, up, magnitude = self._weights(x.dtype)
        gain = magnitude / self._norms(down, up)
        mask_of = self._mask if self.training and (self.dropout or self.rank_dropout) else None
        if not self.on_output:
            return DoraFunction.apply(x, down, up, gain, self.base, self.scale, mask_of)
        output = LoraFunction.apply(x, up, down, up, self.base, self.scale, mask_of, None)
        gain, bias = self._over_outputs(gain), self._bias()
        return (output * gain if bias is None else output * gain + bias * (1 - gain)).to(x.dtype)

    def delta(self, x: Tensor) -> Tensor:
        down, up = self.lora_down.weight, self.lora_up.weight
        gain = self.dora_scale / self._norms(down.to(x.dtype), up.to(x.dtype))
        if self.on_output:
            gain = self._over_outputs(gain)
            return self._base_product(x) * (gain - 1) + super().delta(x) * gain
        gain = gain if gain.ndim == 4 else gain.view(-1)
        return self._base_product((x * (gain - 1)).to(x.dtype)) + super().delta((x * gain).to(x.dtype))

    def _weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """A and B as this pass computes with them, and the norms in fp32."""
        if self.flat and self.training:
            (down, up, _), gradients, sink = self.flat
            return Collected.apply(self.lora_up.weight, sink, gradients, down, up, self.dora_scale.detach())
        return self.lora_down.weight.to(dtype), self.lora_up.weight.to(dtype), self.dora_scale

    @torch.no_grad()
    def _norms(self, down: Tensor, up: Tensor) -> Tensor:
        """|W + s B A| in fp32, in the shape of dora_scale."""
        of_both, of_change = (self._output_products if self.on_output else self._input_products)(down, up)
        squares = self._base_squares(down.device)
        squares = squares + (2 * self.scale * of_both + self.scale**2 * of_change).view_as(squares)
        return squares.clamp(min=torch.finfo(torch.float32).tiny).sqrt()

    def _input_products(self, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """W.(B A) and |B A|^2 of each input."""
        up, inputs, are_last = up.flatten(1), down.shape[1], False
        if down.ndim == 2:
            through = input_gradient_of(self.base, up.t().contiguous(), down.shape)  # B^T W
        else:
            weight = self.base.weight.to(up.dtype)
            are_last = not weight.is_contiguous()  # in memory; what follows makes no copy of W
            weight, down = (value.movedim(1, -1) if are_last else value for value in (weight, down))
            through, down = up.T @ weight.flatten(1), down.flatten(1)
        inner = (up.T @ up) @ down  # B^T B A
        sums = ((part.float() * down.float()).sum(0) for part in (through, inner))
        return tuple(part.view(-1, inputs).sum(0) if are_last else part.view(inputs, -1).sum(1) for part in sums)

    def _output_products(self, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """The same of each output."""
        down, up = down.flatten(1), up.flatten(1)
        through = self.base.weight.flatten(1).to(down.dtype) @ down.T  # W A^T
        return tuple((part.float() * up.float()).sum(1) for part in (through, up @ (down @ down.T)))

    @torch.no_grad()
    def _base_squares(self, device: torch.device) -> Tensor:
        """|W|^2, from the weights as they are when it is first asked for."""
        if self._squares is None:
            weight = self.base.weight
            others = [axis for axis in range(weight.ndim) if self.dora_scale.shape[axis] == 1]
            self._squares = weight.float().square().sum(others, keepdim=True)
        self._squares = self._squares.to(device)
        return self._squares

    def _bias(self) -> Tensor | None:
        """In the shape of outputs."""
        bias = self.base.bias
        return bias.view(-1, 1, 1) if bias is not None and isinstance(self.base, nn.Conv2d) else bias

    def _base_product(self, x: Tensor) -> Tensor:
        """What the base layer makes of x without its bias."""
        output, bias = type(self.base).forward(self.base, x), self._bias()
        return output if bias is None else output - bias

    def _over_outputs(self, gain: Tensor) -> Tensor:
        return gain.view(-1, 1, 1) if isinstance(self.base, nn.Conv2d) else gain.view(-1)

    def flat_parameters(self) -> list[nn.Parameter]:
        own = super().flat_parameters()
        return own and [*own, self.dora_scale]

    def use_flat(self, values: list[Tensor], gradients: list[Tensor]) -> Sink:
        sink = Sink()
        self.flat = values, gradients, sink
        return sink

    def delta_weight(self) -> Tensor:
        return self._parts()[1]

    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """W, W' - W and m / |W + s B A|, by the formula as it stands, in fp32."""
        weight = self.base.weight.to(self.dora_scale.device, torch.float32)
        changed = weight + super().delta_weight().float()
        gain = self.dora_scale / self._norm_of(changed)
        return weight, gain * changed - weight, gain

    def _norm_of(self, weight: Tensor) -> Tensor:
        others = [axis for axis in range(weight.ndim) if self.dora_scale.shape[axis] == 1]
        squares = weight.square().sum(others, keepdim=True)
        return squares.clamp(min=torch.finfo(torch.float32).tiny).sqrt()

    def norm(self) -> Tensor:
        return self.delta_weight().norm()

    def rescale(self, factor: Tensor) -> None:
        """Multiply W' - W: with f for the factor and g = m / |...|, W + f (W' - W) is a DoRA too.

        It is (1 - f + f g) W + f g s B A, so its inputs' columns of A, or its outputs' rows of B, are multiplied with
        f g / (1 - f + f g), and its norms are what they come to.
        """
        weight, delta, gain = self._parts()
        scaled = factor * gain / (1 - factor + factor * gain)
        matrix = (self.lora_up if self.on_output else self.lora_down).weight
        matrix.mul_(torch.where(factor == 1, 1.0, scaled))
        self.dora_scale.copy_(torch.where(factor == 1, self.dora_scale, self._norm_of(weight + factor * delta)))


class DoraFunction(torch.autograd.Function):
    """`apply(x, down, up, gain, layer, scale, mask_of)`: the LoRA of x times `gain` [1, in, ...], which is in fp32.

    As with LoRA only x is kept; what the gain makes of it is made again.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        down: Tensor,
        up: Tensor,
        gain: Tensor,
        layer: nn.Module,
        scale: float,
        mask_of: Callable[[Tensor], Tensor] | None,
    ) -> Tensor:
        ctx.layer, ctx.scale = layer, scale
        output, mask = lora_output(times(x, gain), down, up, layer, scale, mask_of)
        ctx.save_for_backward(x, down, up, gain, mask)
        return output

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, down, up, gain, mask = ctx.saved_tensors
        to_down, to_up = torch.zeros_like(down), torch.zeros_like(up)
        to_scaled = input_gradient_of(ctx.layer, gradient, x.shape)
        add_gradients(ctx, (times(x, gain), down, up, mask), gradient, (to_down, to_up, to_scaled))
        inputs = 1 if gain.ndim == 4 else x.ndim - 1
        to_gain = (to_scaled * x).sum([axis for axis in range(x.ndim) if axis != inputs], dtype=gain.dtype)
        to_input = times(to_scaled, gain) if ctx.needs_input_grad[0] else None
        return to_input, to_down, to_up, to_gain.view_as(gain), None, None, None


def times(x: Tensor, gain: Tensor) -> Tensor:
    """x times the gain of its inputs, in the dtype of x without a copy in fp32; autograd does not know of this."""
    return torch.mul(x, gain if gain.ndim == 4 else gain.view(-1), out=torch.empty_like(x))


def is_of_outputs(magnitude: Tensor) -> bool:
    """Whether norms in a file are those of the outputs."""
    return magnitude.ndim == 1 or len(magnitude) > 1 or magnitude.shape[1] == 1
