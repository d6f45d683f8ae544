"""LoRA (arXiv:2106.09685) for Linear layers and convolutions, and LoCon: LoRA on 3x3 convolutions too (`conv_dim`).

The change of a weight W [out, in] is (alpha / rank) B A, with A [rank, in] random and B [out, rank] zero at the start.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.families.base import AdapterTarget
from library.layers.flat import GradientSink
from networks.base import Adapter, AdapterNetwork
from networks.building import dropouts_of, network_of_file, network_of_ranks
from networks.decomposed import Decomposed, is_of_outputs
from networks.lora_arguments import DORA_ARGUMENTS, RANK_ARGUMENTS, read
from networks.lora_arguments import check_arguments as check_arguments
from networks.lora_arguments import needs_base_weights as needs_base_weights
from networks.lora_arguments import wants_convolutions as wants_convolutions
from networks.lora_function import LoraFunction, hidden_of
from networks.lora_norms import norms_of
from networks.shared_input import SharedInput, share_input


class LoraNetwork(AdapterNetwork):
    """LoRA on all targets; where weights are in one buffer, layers that read the same tensor compute together."""

    def is_plain(self) -> bool:
        """Whether all changes are B A, and nothing more."""
        return all(type(adapter) is LoraAdapter for adapter in self.adapters())

    def norms(self) -> Tensor:
        return norms_of(self.adapters()) if self.is_plain() else super().norms()

    def rescale(self, ratios: Tensor) -> None:
        if not self.is_plain():
            super().rescale(ratios)
            return
        roots = ratios.sqrt().unbind()  # the change is linear in each of two matrices
        matrices = [(adapter.lora_down.weight, adapter.lora_up.weight) for adapter in self.adapters()]
        torch._foreach_mul_([matrix for pair in matrices for matrix in pair], [root for root in roots for _ in "AB"])

    def flatten(self, groups: Sequence[dict], dtype: torch.dtype) -> None:
        super().flatten(groups, dtype)
        beside: dict[tuple, list[LoraAdapter]] = {}
        for adapter in self.adapters():
            if adapter.input:
                beside.setdefault((adapter.part, adapter.input), []).append(adapter)
        for adapters in beside.values():
            share_input(adapters)


class LoraAdapter(Adapter):
    """B A of one layer, named lora_up and lora_down in files."""

    def __init__(
        self,
        target: AdapterTarget,
        rank: int,
        alpha: int | float,
        dropout: float | None = None,
        rank_dropout: float | None = None,
        module_dropout: float | None = None,
    ):
        super().__init__(target, module_dropout)
        self.rank, self.dropout, self.rank_dropout = rank, dropout, rank_dropout
        layer = target.layer
        if isinstance(layer, nn.Linear):
            self.lora_down = nn.Linear(layer.in_features, rank, bias=False)
            self.lora_up = nn.Linear(rank, layer.out_features, bias=False)
        else:
            geometry = (layer.kernel_size, layer.stride, layer.padding)
            self.lora_down = nn.Conv2d(layer.in_channels, rank, *geometry, bias=False)
            self.lora_up = nn.Conv2d(rank, layer.out_channels, 1, bias=False)
        nn.init.kaiming_uniform_(self.lora_down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_up.weight)
        self.register_buffer("alpha", torch.tensor(alpha))  # an integer stays one in the file
        self.scale = alpha / rank
        self.flat: tuple[Tensor, Tensor, GradientSink] | None = None  # A, B and their gradients in shared buffers
        self.shared: SharedInput | None = None  # with the layers beside this one that read the same

    def refresh(self) -> None:
        """Follow an alpha that was loaded from a file."""
        self.scale = self.alpha.item() / self.rank

    def forward(self, x: Tensor) -> Tensor:
        if self.is_stacked or torch.is_autocast_enabled(x.device.type) or torch.compiler.is_compiling():
            return super().forward(x)  # a compiler makes one function of the layer by itself
        if self.multiplier == 0 or self._is_dropped():
            return self.base_output(x)
        if self.shared and self.training:
            return self.shared.output(self, x)
        down, up, sink = self.lora_down.weight, self.lora_up.weight, None
        if self.flat is not None and self.training:
            down, up, sink = self.flat
        mask_of = self._mask if self.training and (self.dropout or self.rank_dropout) else None
        scale = self.scale * self.multiplier
        down, up = down.to(x.dtype), up.to(x.dtype)
        return LoraFunction.apply(x, self.lora_up.weight, down, up, self.base, scale, mask_of, sink)

    def delta(self, x: Tensor) -> Tensor:
        down, up = self.lora_down.weight, self.lora_up.weight
        if not torch.is_autocast_enabled(x.device.type):
            down, up = down.to(x.dtype), up.to(x.dtype)
        hidden = hidden_of(x, down, self.base)
        if self.training and (self.dropout or self.rank_dropout):
            hidden = hidden * self._mask(hidden)
        return (F.linear(hidden, up) if up.ndim == 2 else F.conv2d(hidden, up)) * self.scale

    def _mask(self, hidden: Tensor) -> Tensor:
        """What dropout multiplies A x with: survivors are scaled by 1 / (1 - p), ranks fall out for whole samples."""
        mask = hidden.new_ones(hidden.shape)
        if self.dropout:
            mask = F.dropout(mask, self.dropout)
        if self.rank_dropout:
            mask = mask * self._rank_mask(hidden)
        return mask

    def _rank_mask(self, hidden: Tensor) -> Tensor:
        """One decision per sample and rank."""
        kept = torch.rand(hidden.shape[0], self.rank, device=hidden.device) > self.rank_dropout  # [B, rank]
        if hidden.ndim == 4:
            kept = kept[:, :, None, None]
        elif hidden.ndim == 3:
            kept = kept[:, None, :]
        return kept.to(hidden.dtype) / (1 - self.rank_dropout)

    def flat_parameters(self) -> list[nn.Parameter]:
        return [] if self.module_dropout else [self.lora_down.weight, self.lora_up.weight]

    def use_flat(self, values: list[Tensor], gradients: list[Tensor]) -> GradientSink:
        sink = GradientSink(*gradients)
        self.flat = *values, sink
        return sink

    def delta_weight(self) -> Tensor:
        down, up = self.lora_down.weight, self.lora_up.weight
        product = up.flatten(1) @ down.flatten(1)
        return (product * self.scale).view(self.base.weight.shape)

    def plus_parameters(self) -> list[nn.Parameter]:
        return [self.lora_up.weight]


class DoraAdapter(Decomposed, LoraAdapter):
    """DoRA of one layer, with dora_scale beside them."""


def create_network(
    targets: list[AdapterTarget],
    network_dim: int | None,
    network_alpha: int | float | None,
    neuron_dropout: float | None = None,
    **network_args: str,
) -> AdapterNetwork:
    """A LoRA network on the targets; `network_args` are kohya's, as strings, and `dora`."""
    given = read(network_args)
    dropouts = dropouts_of(given, neuron_dropout)
    make = partial(LoraAdapter, **dropouts)
    if given.get("dora"):
        make = partial(DoraAdapter, on_output=given.get("wd_on_output", False), **dropouts)
    return network_of_ranks(LoraNetwork, targets, network_dim, network_alpha, given, make)


def create_network_from_weights(
    targets: list[AdapterTarget], path: Path, neuron_dropout: float | None = None, **network_args: str
) -> AdapterNetwork:
    """The network of a file, LoRA or DoRA by layer; of `network_args` what is not about ranks still counts."""
    given = read(network_args)
    dropouts = dropouts_of(given, neuron_dropout)

    def make(target: AdapterTarget, weights: Mapping[str, Tensor]) -> LoraAdapter:
        rank, alpha = rank_of(weights), weights["alpha"].flatten()[0].item()
        if "dora_scale" not in weights:
            return LoraAdapter(target, rank, alpha, **dropouts)
        return DoraAdapter(target, rank, alpha, on_output=is_of_outputs(weights["dora_scale"]), **dropouts)

    unused = *RANK_ARGUMENTS, *DORA_ARGUMENTS
    return network_of_file(LoraNetwork, targets, path, given, rank_of, make, unused)


def rank_of(weights: Mapping[str, Tensor]) -> int | None:
    """The rank of a layer of a file."""
    down = weights.get("lora_down.weight")
    return len(down) if down is not None and down.ndim and len(down) else None
