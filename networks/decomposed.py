"""DoRA (arXiv:2402.09353): a LoRA whose changed weight has norms that are learned apart from its direction.

W' = m (W + s B A) / |W + s B A|, with the norms taken over the weights of each input (`dora_scale` [1, in, ...]), or of
each output ([out, 1, ...]). What divides is taken as a constant in the backward pass (section 4.3). So W' x is the LoRA
of x times m / |...|, or that many times the LoRA of x (`networks/dora_function.py`), and

    |W + s B A|^2 = |W|^2 + 2 s W.(B A) + s^2 |B A|^2

costs what a LoRA costs for as many rows as its rank; nothing as large as W is made.
"""

import torch
from torch import Tensor, nn

from library.families.base import AdapterTarget
from library.layers.frozen import input_gradient_of
from networks.base import Adapter, AdapterNetwork, over_outputs, without_bias
from networks.dora_function import DoraFunction, DoraSink


class DecomposedNetwork(AdapterNetwork):
    """A network whose adapters may be `Decomposed`; these keep their norms until the weights change."""

    def training_begins(self, num_steps: int, step: int) -> None:
        super().training_begins(num_steps, step)
        for adapter in self.decomposed():
            adapter.keeps_norms = True

    def weights_updated(self, taken: Tensor | bool) -> None:
        super().weights_updated(taken)
        for adapter in self.decomposed():
            adapter.kept_norms = None

    def decomposed(self) -> list["Decomposed"]:
        return [adapter for adapter in self.adapters() if isinstance(adapter, Decomposed)]


class Decomposed(Adapter):
    """What makes DoRA of the adapter behind it in the order of inheritance, which has A and B as LoRA has them."""

    def __init__(self, target: AdapterTarget, *args, on_output: bool = False, **kwargs):
        super().__init__(target, *args, **kwargs)
        self.input = None  # what it computes with is its own
        self.on_output = on_output
        self._squares: Tensor | None = None  # |W|^2 in fp32, in the shape of dora_scale
        self.keeps_norms, self.kept_norms = False, None  # whether somebody says when the weights change
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
        sink, magnitude = None, self.dora_scale
        if self.flat and self.training:
            down, up, sink = self.flat
        else:
            down, up = self.lora_down.weight.to(x.dtype), self.lora_up.weight.to(x.dtype)
        mask_of = self._mask if self.training and (self.dropout or self.rank_dropout) else None
        values = x, self.anchor(), down, up, magnitude, self._norms_of_step(down, up)
        return DoraFunction.apply(*values, self.base, self.scale, self.on_output, mask_of, sink)

    def delta(self, x: Tensor) -> Tensor:
        down, up = self.lora_down.weight, self.lora_up.weight
        gain = self.dora_scale / self._norms(down.to(x.dtype), up.to(x.dtype))
        if self.on_output:
            gain = over_outputs(gain, self.base)
            return self._base_product(x) * (gain - 1) + super().delta(x) * gain
        gain = gain if gain.ndim == 4 else gain.view(-1)
        return self._base_product((x * (gain - 1)).to(x.dtype)) + super().delta((x * gain).to(x.dtype))

    def _norms_of_step(self, down: Tensor, up: Tensor) -> Tensor:
        """The norms, computed once between two updates of the weights where the network tells of these.

        A graph that is being recorded computes its own each time.
        """
        if not (self.keeps_norms and self.training) or down.is_cuda and torch.cuda.is_current_stream_capturing():
            return self._norms(down, up)
        if self.kept_norms is None:
            self.kept_norms = self._norms(down, up)
        return self.kept_norms

    @torch.no_grad()
    def _norms(self, down: Tensor, up: Tensor) -> Tensor:
        """|W + s B A| in fp32, in the shape of dora_scale."""
        change = (self._output_squares if self.on_output else self._input_squares)(down, up)
        squares = self._base_squares(down.device)
        squares = torch.add(squares, change.view_as(squares), alpha=self.scale)
        return squares.clamp_(min=torch.finfo(torch.float32).tiny).sqrt_()

    def _input_squares(self, down: Tensor, up: Tensor) -> Tensor:
        """2 W.(B A) + s |B A|^2 of each input, as (2 B^T W + s B^T B A).A."""
        up, inputs, are_last = up.flatten(1), down.shape[1], False
        if down.ndim == 2:
            through = input_gradient_of(self.base, up.t().contiguous(), down.shape)  # B^T W
        else:
            weight = self.base.weight.to(up.dtype)
            are_last = not weight.is_contiguous()  # in memory; what follows makes no copy of W
            weight, down = (value.movedim(1, -1) if are_last else value for value in (weight, down))
            through, down = up.T @ weight.flatten(1), down.flatten(1)
        through = torch.addmm(through, up.T @ up, down, beta=2, alpha=self.scale)
        sums = through.mul_(down).sum(0, dtype=torch.float32)
        return sums.view(-1, inputs).sum(0) if are_last else sums.view(inputs, -1).sum(1)

    def _output_squares(self, down: Tensor, up: Tensor) -> Tensor:
        """The same of each output, as (2 W A^T + s B A A^T).B."""
        down, up = down.flatten(1), up.flatten(1)
        through = self.base.weight.flatten(1).to(down.dtype) @ down.T
        through = torch.addmm(through, up, down @ down.T, beta=2, alpha=self.scale)
        return through.mul_(up).sum(1, dtype=torch.float32)

    @torch.no_grad()
    def _base_squares(self, device: torch.device) -> Tensor:
        """|W|^2, from the weights as they are when it is first asked for."""
        if self._squares is None:
            weight = self.base.weight
            others = [axis for axis in range(weight.ndim) if self.dora_scale.shape[axis] == 1]
            self._squares = weight.float().square().sum(others, keepdim=True)
        self._squares = self._squares.to(device)
        return self._squares

    def _base_product(self, x: Tensor) -> Tensor:
        """What the base layer makes of x without its bias."""
        return without_bias(type(self.base).forward(self.base, x), self.base)

    def flat_parameters(self) -> list[nn.Parameter]:
        own = super().flat_parameters()
        return own and [*own, self.dora_scale]

    def use_flat(self, values: list[Tensor], gradients: list[Tensor]) -> DoraSink:
        sink = DoraSink(*gradients)
        self.flat = *values[:2], sink
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


def is_of_outputs(magnitude: Tensor) -> bool:
    """Whether norms in a file are those of the outputs."""
    return magnitude.ndim == 1 or len(magnitude) > 1 or magnitude.shape[1] == 1
