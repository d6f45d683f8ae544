"""How networks of LoRA's kind are made: with ranks by block, by kind of layer and by name, or from a file."""

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.families.base import AdapterTarget
from library.families.blocks import BlockLayout
from library.network_files import read_weights
from networks import blocks
from networks.base import Adapter, AdapterNetwork, build_adapters, is_pointwise, under_our_names
from networks.lora_arguments import DEFAULT_RANK, OF_FILE
from networks.norms import NormAdapter, is_norm
from networks.param_groups import LearningRateRules
from networks.patterns import ARGUMENTS as PATTERN_ARGUMENTS
from networks.patterns import matching, without_layers

logger = logging.getLogger(__name__)


def network_of_ranks(
    targets: list[AdapterTarget],
    network_dim: int | None,
    network_alpha: int | float | None,
    neuron_dropout: float | None,
    given: dict[str, Any],
    make_adapter: Callable[..., Adapter],
    network_class: type[AdapterNetwork],
) -> AdapterNetwork:
    """A network of adapters of this kind, with the ranks and rates of `given`.

    Layers that are not Linear or 1x1 take `conv_dim` and `conv_alpha`, and are left alone without them. A block of the
    U-Net whose learning rate has the weight 0 is left alone too.
    """
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

    def make(target: AdapterTarget) -> Adapter | None:
        if weights and target.block is not None and weights[target.block] == 0:
            return None
        if is_norm(target.layer):
            return NormAdapter(target)
        rank, alpha = (pointwise if is_pointwise(target.layer) else convolutions).of(target.block)
        rank, alpha = of_patterns(given, target.name, rank, alpha)
        if not rank:
            return None
        return make_adapter(target, rank, alpha * math.sqrt(rank) if given.get("rslora") else alpha, **dropouts)

    network = network_class(build_adapters(targets, make), learning_rate_rules(given, weights))
    warn_of_patterns(given, [target.name for target in targets])
    return network


def of_patterns(given: dict[str, Any], name: str, rank: int, alpha: int | float) -> tuple[int, int | float]:
    """Rank and alpha of a layer, by its name where that matches; an alpha that is the rank follows the rank."""
    if found := matching(given.get("network_reg_dims"), name):
        rank, alpha = found.value, found.value if alpha == rank else alpha
    if found := matching(given.get("network_reg_alphas"), name):
        alpha = found.value or rank
    return rank, alpha


def warn_of_patterns(given: dict[str, Any], names: list[str]) -> None:
    """A line for every pattern that no layer has."""
    for argument in PATTERN_ARGUMENTS:
        for expression in without_layers(given.get(argument, ()), names):
            logger.warning("--network_args: %s: no layer's name matches %r", argument, expression)


def network_of_file(
    targets: list[AdapterTarget],
    path: Path,
    neuron_dropout: float | None,
    given: dict[str, Any],
    make_adapter: Callable[..., Adapter],
    network_class: type[AdapterNetwork],
) -> AdapterNetwork:
    """The network of a file, of adapters of this kind."""
    unused = [name for name in OF_FILE if name in given]
    if unused:
        logger.warning("--network_args: %s: no effect, ranks and alphas are those of %s", ", ".join(unused), path)
    layout = layout_of(targets)
    blocks.check_layout({name: value for name, value in given.items() if name not in unused}, layout)
    ranks, weights = read_ranks(targets, path)
    dropouts = dropouts_of(given, neuron_dropout)

    def make(target: AdapterTarget) -> Adapter | None:
        if f"{target.name}.w_norm" in weights:
            return NormAdapter(target)
        if not ranks.get(target.name):
            return None
        alpha = weights[f"{target.name}.alpha"].flatten()[0].item()
        bias = {"train_bias": True} if f"{target.name}.diff_b" in weights else {}
        return make_adapter(target, ranks[target.name], alpha, **dropouts, **bias)

    rules = learning_rate_rules(given, blocks.block_lr_weights(given, layout))
    network = network_class(build_adapters(targets, make), rules)
    network.take_weights(weights, path)
    return network


def read_ranks(targets: list[AdapterTarget], path: Path) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Ranks by layer, and the weights, of a file, whose layers may have the names of another program."""
    names = {target.other_name: target.name for target in targets}
    return completed(under_our_names(read_weights(path), names))


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
    ratios = {name: ratio for name, ratio in ratios.items() if ratio is not None}
    return LearningRateRules(ratios, block_weights, given.get("network_reg_lrs", ()))
