"""LoRA (arXiv:2106.09685) for Linear layers and convolutions, and LoCon: LoRA on 3x3 convolutions too (`conv_dim`).

The change of a weight W [out, in] is (alpha / rank) B A, with A [rank, in] random and B [out, rank] zero at the start.
"""

import logging
import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.families.base import AdapterTarget
from library.families.blocks import BlockLayout
from library.layers.flat import GradientSink
from library.network_files import read_weights
from networks import blocks
from networks.base import Adapter, AdapterNetwork, build_adapters, is_pointwise, under_our_names
from networks.lora_arguments import DEFAULT_RANK, RANK_ARGUMENTS, read
from networks.lora_arguments import check_arguments as check_arguments
from networks.lora_arguments import wants_convolutions as wants_convolutions
from networks.lora_function import LoraFunction, hidden_of
from networks.lora_norms import norms_of
from networks.param_groups import LearningRateRules
from networks.shared_input import SharedInput, share_input

logger = logging.getLogger(__name__)


class LoraNetwork(AdapterNetwork):
    """LoRA on all targets; where weights are in one buffer, layers that read the same tensor compute together."""

    def norms(self) -> Tensor:
        return norms_of(self.adapters())

    def rescale(self, ratios: Tensor) -> None:
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

    def matrices(self) -> tuple[Tensor, Tensor]:
        """A and B."""
        return self.lora_down.weight, self.lora_up.weight

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
        (down, up), sink = self.matrices(), None
        if self.flat is not None and self.training:
            down, up, sink = self.flat
        mask_of = self._mask if self.training and (self.dropout or self.rank_dropout) else None
        scale = self.scale * self.multiplier
        down, up = down.to(x.dtype), up.to(x.dtype)
        return LoraFunction.apply(x, self.lora_up.weight, down, up, self.base, scale, mask_of, sink)

    def delta(self, x: Tensor) -> Tensor:
        down, up = self.matrices()
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
        down, up = self.matrices()
        product = up.flatten(1) @ down.flatten(1)
        return (product * self.scale).view(self.base.weight.shape)

    def plus_parameters(self) -> list[nn.Parameter]:
        return [self.lora_up.weight]


def create_network(
    targets: list[AdapterTarget],
    network_dim: int | None,
    network_alpha: int | float | None,
    neuron_dropout: float | None = None,
    **network_args: str,
) -> AdapterNetwork:
    """A LoRA network on the targets; `network_args` are kohya's, as strings.

    Layers that are not Linear or 1x1 take `conv_dim` and `conv_alpha`, and are left alone without them. A block of the
    U-Net whose learning rate has the weight 0 is left alone too.
    """
    given = read(network_args)
    layout = layout_of(targets)
    blocks.check_layout(given, layout)
    weights = blocks.block_lr_weights(given, layout)
    rank = network_dim or DEFAULT_RANK
    pointwise = blocks.Ranks(rank, network_alpha or 0, given.get("block_dims"), given.get("block_alphas"))
    convolutions = blocks.Ranks(
        given.get("conv_dim", 0), given.get("conv_alpha", 1.0),
        given.get("conv_block_dims"), given.get("conv_block_alphas"),
    )  # fmt: skip
    dropouts = dropouts_of(given, neuron_dropout)

    def make(target: AdapterTarget) -> LoraAdapter | None:
        if weights and target.block is not None and weights[target.block] == 0:
            return None
        rank, alpha = (pointwise if is_pointwise(target.layer) else convolutions).of(target.block)
        return LoraAdapter(target, rank, alpha, **dropouts) if rank else None

    return LoraNetwork(build_adapters(targets, make), learning_rate_rules(given, weights))


def create_network_from_weights(
    targets: list[AdapterTarget], path: Path, neuron_dropout: float | None = None, **network_args: str
) -> AdapterNetwork:
    """The network of a file: its layers, ranks, alphas and weights; of `network_args` the others still count."""
    given = read(network_args)
    unused = [name for name in RANK_ARGUMENTS if name in given]
    if unused:
        logger.warning("--network_args: %s: no effect, ranks and alphas are those of %s", ", ".join(unused), path)
    layout = layout_of(targets)
    blocks.check_layout({name: value for name, value in given.items() if name not in unused}, layout)
    names = {target.other_name: target.name for target in targets}
    ranks, weights = completed(under_our_names(read_weights(path), names))
    dropouts = dropouts_of(given, neuron_dropout)

    def make(target: AdapterTarget) -> LoraAdapter | None:
        if not ranks.get(target.name):
            return None
        alpha = weights[f"{target.name}.alpha"].flatten()[0].item()
        return LoraAdapter(target, ranks[target.name], alpha, **dropouts)

    rules = learning_rate_rules(given, blocks.block_lr_weights(given, layout))
    network = LoraNetwork(build_adapters(targets, make), rules)
    network.take_weights(weights, path)
    return network


def completed(weights: dict[str, Tensor]) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Ranks by layer, and the weights with an alpha for all: old files have none, and mean the rank."""
    end = ".lora_down.weight"
    downs = {name.removesuffix(end): value for name, value in weights.items() if name.endswith(end) and value.ndim}
    ranks = {name: len(down) for name, down in downs.items()}
    return ranks, {f"{name}.alpha": torch.tensor(rank) for name, rank in ranks.items()} | weights


def layout_of(targets: list[AdapterTarget]) -> BlockLayout | None:
    return next((target.layout for target in targets if target.layout), None)


def dropouts_of(given: dict, neuron_dropout: float | None) -> dict[str, float | None]:
    return {
        "dropout": given.get("dropout", neuron_dropout),
        "rank_dropout": given.get("rank_dropout"),
        "module_dropout": given.get("module_dropout"),
    }


def learning_rate_rules(given: dict, block_weights: list[float] | None) -> LearningRateRules:
    general = given.get("loraplus_lr_ratio")
    ratios = {
        "textencoder": given.get("loraplus_text_encoder_lr_ratio", general),
        "unet": given.get("loraplus_unet_lr_ratio", general),
    }
    return LearningRateRules({name: ratio for name, ratio in ratios.items() if ratio is not None}, block_weights)
