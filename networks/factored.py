"""Adapters whose change of a weight is some product of small matrices, which files hold under names of their own."""

from collections.abc import Callable, Mapping, Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.errors import UserError
from library.families.base import AdapterTarget
from library.layers.flat import Collected, Sink
from networks.base import Adapter
from networks.lora_function import geometry

Shapes = Mapping[str, Sequence[int]]


class FactoredAdapter(Adapter):
    """(alpha / rank) times a product of the parameters. Subclasses fill in `product` and `changed_output`."""

    def __init__(
        self,
        target: AdapterTarget,
        shapes: Shapes,
        rank: int,
        alpha: int | float,
        dropout: float | None = None,
        rank_dropout: float | None = None,
        module_dropout: float | None = None,
    ):
        super().__init__(target, module_dropout)
        self.rank, self.dropout, self.rank_dropout = rank, dropout, rank_dropout
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(*shape)))
        self.names = tuple(shapes)
        self.register_buffer("alpha", torch.tensor(alpha))  # an integer stays one in the file
        self.flat: tuple[list[Tensor], list[Tensor], Sink] | None = None  # values and gradients in shared buffers
        self.refresh()

    def refresh(self) -> None:
        self.scale = self.alpha.item() / self.rank

    def product(self, factors: Mapping[str, Tensor]) -> Tensor:
        """The change of the weight by its parameters, without the scale, in the weight's shape."""
        raise NotImplementedError

    def changed_output(self, x: Tensor, factors: Mapping[str, Tensor], scale: float) -> Tensor:
        """What the layer gives for x with the change `scale` times as large."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        is_plain = self.is_stacked or torch.is_autocast_enabled(x.device.type) or torch.compiler.is_compiling()
        if is_plain or self.training and (self.dropout or self.rank_dropout):
            return super().forward(x)
        if self.multiplier == 0 or self._is_dropped():
            return self.base_output(x)
        return self.changed_output(x, self._factors(x.dtype), self.scale * self.multiplier)

    def delta(self, x: Tensor) -> Tensor:
        return self.dropped(self.change(x, self._factors(x.dtype)) * self.scale)

    def change(self, x: Tensor, factors: Mapping[str, Tensor]) -> Tensor:
        """What the change adds to the output for x, without the scale, in operations that autograd knows."""
        return product_with(x, self.product(factors), self.base)

    def dropped(self, change: Tensor) -> Tensor:
        """What dropouts leave of the change of an output: values, and whole outputs of each sample."""
        if not self.training:
            return change
        if self.dropout:
            change = F.dropout(change, self.dropout)
        if self.rank_dropout:
            axis = 1 if isinstance(self.base, nn.Conv2d) else -1
            shape = [1] * change.ndim
            shape[0], shape[axis] = change.shape[0], change.shape[axis]
            kept = torch.rand(shape, device=change.device) > self.rank_dropout
            change = change * kept / (1 - self.rank_dropout)
        return change

    def _factors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The parameters as this pass computes with them."""
        if self.flat and self.training:
            values, gradients, sink = self.flat
            anchor = getattr(self, self.names[0])
            return dict(zip(self.names, Collected.apply(anchor, sink, gradients, *values), strict=True))
        return {name: parameter.to(dtype) for name, parameter in self.own().items()}

    def own(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.names}

    def flat_parameters(self) -> list[nn.Parameter]:
        return [] if self.module_dropout else list(self.own().values())

    def use_flat(self, values: list[Tensor], gradients: list[Tensor]) -> Sink:
        sink = Sink()
        self.flat = values, gradients, sink
        return sink

    def delta_weight(self) -> Tensor:
        return self.product(self.own()) * self.scale


def product_with(x: Tensor, weight: Tensor, layer: nn.Module) -> Tensor:
    """What a layer with this weight and no bias makes of x."""
    return F.linear(x, weight) if weight.ndim == 2 else F.conv2d(x, weight, None, *geometry(layer))


def with_core(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """A weight [out, in, ...] of a core [rank, rank, ...], A [rank, out] and B [rank, in].

    It lies in memory as layers have it; convolutions of other layouts round otherwise.
    """
    return torch.einsum("mn...,mo,ni->oi...", core, a, b).contiguous()


def sizes_of(layer: nn.Module) -> tuple[int, int, tuple[int, ...]]:
    """Outputs, inputs and kernel of a Linear or Conv2d; the kernel of a Linear is ()."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features, ()
    return layer.out_channels, layer.in_channels, layer.kernel_size


def shapes_of(
    names: Sequence[str], weights: Mapping[str, Tensor], changes: Callable[[Shapes], tuple[int, int]], layer: nn.Module
) -> Shapes:
    """The sizes of a layer's weights in a file; UserError unless `changes` says that they fit the layer."""
    shapes = {name: tuple(weights[name].shape) for name in names if name in weights}
    outputs, inputs, kernel = sizes_of(layer)
    if changes(shapes) != (outputs, inputs * prod(kernel)):
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise UserError(f"a layer of {outputs} outputs and {inputs} inputs cannot be changed by {listed}")
    return shapes
