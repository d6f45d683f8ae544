"""LoRA (arXiv:2106.09685) for Linear layers and convolutions, and LoCon: LoRA on 3x3 convolutions too (`conv_dim`).

The change of a weight W [out, in] is (alpha / rank) B A, with A [rank, in] random and B [out, rank] zero at the start.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.errors import UserError
from library.families.base import AdapterTarget
from networks.arguments import read_arguments
from networks.base import Adapter, AdapterNetwork, build_adapters, is_pointwise

ARGUMENTS = {
    "conv_dim": int,
    "conv_alpha": float,
    "dropout": float,
    "rank_dropout": float,
    "module_dropout": float,
    "loraplus_lr_ratio": float,
    "loraplus_unet_lr_ratio": float,
    "loraplus_text_encoder_lr_ratio": float,
}


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

    def refresh(self) -> None:
        """Follow an alpha that was loaded from a file."""
        self.scale = self.alpha.item() / self.rank

    def delta(self, x: Tensor) -> Tensor:
        hidden = self.lora_down(x if torch.is_autocast_enabled(x.device.type) else x.to(self.lora_down.weight.dtype))
        if self.training and self.dropout:
            hidden = F.dropout(hidden, self.dropout)
        if self.training and self.rank_dropout:
            hidden = hidden * self._rank_mask(hidden)
        return self.lora_up(hidden) * self.scale

    def _rank_mask(self, hidden: Tensor) -> Tensor:
        """One decision per sample and rank, survivors scaled by 1 / (1 - p)."""
        kept = torch.rand(hidden.shape[0], self.rank, device=hidden.device) > self.rank_dropout  # [B, rank]
        if hidden.ndim == 4:
            kept = kept[:, :, None, None]
        elif hidden.ndim == 3:
            kept = kept[:, None, :]
        return kept.to(hidden.dtype) / (1 - self.rank_dropout)

    def delta_weight(self) -> Tensor:
        down, up = self.lora_down.weight, self.lora_up.weight
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

    Layers that are not Linear or 1x1 take `conv_dim` and `conv_alpha`, and are left alone without them.
    """
    given = read_arguments("networks.lora", ARGUMENTS, network_args)
    rank = network_dim or 4
    alpha = network_alpha or rank
    conv_rank, conv_alpha = given.get("conv_dim"), given.get("conv_alpha", 1.0)
    dropouts = dict(
        dropout=given.get("dropout", neuron_dropout),
        rank_dropout=given.get("rank_dropout"),
        module_dropout=given.get("module_dropout"),
    )

    def make(target: AdapterTarget) -> LoraAdapter | None:
        if is_pointwise(target.layer):
            return LoraAdapter(target, rank, alpha, **dropouts)
        return LoraAdapter(target, conv_rank, conv_alpha or conv_rank, **dropouts) if conv_rank else None

    general = given.get("loraplus_lr_ratio")
    ratios = {
        "textencoder": given.get("loraplus_text_encoder_lr_ratio", general),
        "unet": given.get("loraplus_unet_lr_ratio", general),
    }
    return AdapterNetwork(build_adapters(targets, make), {name: r for name, r in ratios.items() if r is not None})


def check_arguments(network_args: dict[str, str]) -> None:
    """UserError where `--network_args` has something that is not for LoRA."""
    given = read_arguments("networks.lora", ARGUMENTS, network_args)
    if "conv_alpha" in given and "conv_dim" not in given:
        raise UserError("network_args: conv_alpha needs conv_dim")


def wants_convolutions(network_args: dict[str, str]) -> bool:
    """Whether residual blocks and samplers are to be adapted too."""
    return bool(network_args.get("conv_dim"))
