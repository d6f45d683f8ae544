"""LoRA-FA (arXiv:2308.03303): LoRA whose A stays as it was drawn; B alone is trained.

B's gradient needs A x, which is as narrow as the rank, so the layer's input is not kept for the backward pass.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.families.base import AdapterTarget
from library.layers.flat import GradientSink
from library.layers.frozen import add_product, input_gradient_of, output_of, product_of
from networks.base import AdapterNetwork
from networks.building import dropouts_of, network_of_file, network_of_ranks
from networks.lora import of_weights, rank_of
from networks.lora_adapter import LoraAdapter
from networks.lora_arguments import OF_FILE
from networks.lora_fa_arguments import check_arguments as check_arguments
from networks.lora_fa_arguments import read
from networks.lora_fa_arguments import wants_convolutions as wants_convolutions
from networks.lora_function import POINTWISE, convolution_gradients, geometry, hidden_of, masked, rows_of


class LoraFaFunction(torch.autograd.Function):
    """`apply(x, anchor, down, up, layer, scale, mask_of, sink)`, as LoraFunction; `down` has no gradient."""

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
        ctx.layer, ctx.scale, ctx.sink, ctx.shape = layer, scale, sink, x.shape
        output = output_of(layer, x)
        hidden = hidden_of(x, down, layer)
        mask = mask_of and mask_of(hidden)
        hidden = masked(hidden, mask)
        ctx.save_for_backward(hidden, down, up, mask)
        if down.ndim == 2:
            add_product(output, rows_of(hidden), up, scale, product_of(layer))
            return output
        return output.add_(F.conv2d(hidden, up), alpha=scale)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (hidden, down, up, mask), sink = ctx.saved_tensors, ctx.sink  # unpacked once, as checkpoints demand
        to_up = torch.zeros_like(up) if sink is None else sink.up
        if sink is not None:
            sink.mark()
        to_input = input_gradient_of(ctx.layer, gradient, ctx.shape) if ctx.needs_input_grad[0] else None
        if down.ndim == 2:
            to_up.addmm_(rows_of(gradient).t(), rows_of(hidden), alpha=ctx.scale)
            if to_input is not None:
                product = product_of(ctx.layer)
                of_hidden = rows_of(masked(product(gradient, up.t()), mask))
                add_product(to_input, of_hidden, down.t(), ctx.scale, product)
        else:
            of_hidden, of_up = convolution_gradients(gradient, hidden, up, POINTWISE, to_input is not None)
            to_up.add_(of_up, alpha=ctx.scale)
            if to_input is not None:
                shape_and_weight = ctx.shape, down, masked(of_hidden, mask)
                to_input.add_(nn.grad.conv2d_input(*shape_and_weight, *geometry(ctx.layer)), alpha=ctx.scale)
        return to_input, None, None, to_up if sink is None else None, None, None, None, None


class Held(nn.Module):
    """A matrix that is in files and is not trained."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.register_buffer("weight", weight)


class LoraFaAdapter(LoraAdapter):
    """A is drawn from a normal distribution of variance 2 / (inputs + rank)."""

    function = LoraFaFunction

    def __init__(self, target: AdapterTarget, rank: int, alpha: int | float, **dropouts: float | None):
        super().__init__(target, rank, alpha, **dropouts)
        down = self.lora_down.weight.detach()
        self.lora_down = Held(nn.init.normal_(down, std=math.sqrt(2 / (down.shape[1] + rank))))

    def rescale(self, factor: Tensor) -> None:
        self.lora_up.weight.mul_(factor)

    def flat_parameters(self) -> list[nn.Parameter]:
        return [] if self.module_dropout else [self.lora_up.weight]

    def use_flat(self, values: list[Tensor], gradients: list[Tensor]) -> GradientSink:
        sink = GradientSink(None, *gradients)
        self.flat = self.lora_down.weight, *values, sink
        return sink


def create_network(
    targets: list[AdapterTarget],
    network_dim: int | None,
    network_alpha: int | float | None,
    neuron_dropout: float | None = None,
    **network_args: str,
) -> AdapterNetwork:
    """A LoRA-FA network on the targets; `network_args` are those of networks.lora without LoRA+."""
    given = read(network_args)
    make = partial(LoraFaAdapter, **dropouts_of(given, neuron_dropout))
    return network_of_ranks(AdapterNetwork, targets, network_dim, network_alpha, given, make)


def create_network_from_weights(
    targets: list[AdapterTarget], path: Path, neuron_dropout: float | None = None, **network_args: str
) -> AdapterNetwork:
    """The network of a file: its layers, ranks, alphas and weights; of `network_args` the others still count."""
    given = read(network_args)
    make = partial(of_weights, partial(LoraFaAdapter, **dropouts_of(given, neuron_dropout)))
    return network_of_file(AdapterNetwork, targets, path, given, rank_of, make, OF_FILE)
