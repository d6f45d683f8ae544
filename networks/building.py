"""Networks whose layers have a rank and an alpha each: made of `--network_args`, or as a file has them."""

import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.errors import UserError
from library.families.base import AdapterTarget
from library.families.blocks import BlockLayout
from library.network_files import read_weights
from networks import blocks
from networks.base import Adapter, AdapterNetwork, build_adapters, is_pointwise, under_our_names
from networks.lora_arguments import DEFAULT_RANK, RANK_ARGUMENTS
from networks.norms import NormAdapter, is_norm
from networks.param_groups import LearningRateRules
from networks.patterns import ARGUMENTS as PATTERN_ARGUMENTS
from networks.patterns import matching, without_layers

logger = logging.getLogger(__name__)

OfRank = Callable[[AdapterTarget, int, int | float], Adapter]
OfWeights = Callable[[AdapterTarget, Mapping[str, Tensor]], Adapter]  # weights of a layer by the ends of their names


def network_of_ranks(
    kind: type[AdapterNetwork],
    targets: list[AdapterTarget],
    network_dim: int | None,
    network_alpha: int | float | None,
    given: Mapping[str, Any],
    make: OfRank,
) -> AdapterNetwork:
    """A new network; `given` are the arguments as they were read.

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

    def adapter_of(target: AdapterTarget) -> Adapter | None:
        if weights and target.block is not None and weights[target.block] == 0:
            return None
        if is_norm(target.layer):
            return NormAdapter(target)
        rank, alpha = (pointwise if is_pointwise(target.layer) else convolutions).of(target.block)
        rank, alpha = of_patterns(given, target.name, rank, alpha)
        if not rank:
            return None
        return make(target, rank, alpha * math.sqrt(rank) if given.get("rslora") else alpha)

    network = kind(build_adapters(targets, adapter_of), learning_rate_rules(given, weights))
    warn_of_patterns(given, [target.name for target in targets])
    return network


def of_patterns(given: Mapping[str, Any], name: str, rank: int, alpha: int | float) -> tuple[int, int | float]:
    """Rank and alpha of a layer, by its name where that matches; an alpha that is the rank follows the rank."""
    if found := matching(given.get("network_reg_dims"), name):
        rank, alpha = found.value, found.value if alpha == rank else alpha
    if found := matching(given.get("network_reg_alphas"), name):
        alpha = found.value or rank
    return rank, alpha


def warn_of_patterns(given: Mapping[str, Any], names: list[str]) -> None:
    """A line for every pattern that no layer has."""
    for argument in PATTERN_ARGUMENTS:
        for expression in without_layers(given.get(argument, ()), names):
            logger.warning("--network_args: %s: no layer's name matches %r", argument, expression)


def network_of_file(
    kind: type[AdapterNetwork],
    targets: list[AdapterTarget],
    path: Path,
    given: Mapping[str, Any],
    rank_of: Callable[[Mapping[str, Tensor]], int | None],
    make: OfWeights,
    unused: tuple[str, ...] = RANK_ARGUMENTS,
) -> AdapterNetwork:
    """The network of a file: its layers, ranks, alphas and weights; of what is `given` the others still count.

    `rank_of` tells the rank of a layer's weights, None where they are none of the algorithm's.
    """
    named = [name for name in unused if name in given]
    if named:
        logger.warning("--network_args: %s: no effect, ranks and alphas are those of %s", ", ".join(named), path)
    layout = layout_of(targets)
    blocks.check_layout({name: value for name, value in given.items() if name not in named}, layout)
    weights = under_our_names(read_weights(path), {target.other_name: target.name for target in targets})
    layers = layers_of(weights)
    for name, layer in layers.items():  # old files have no alpha, and mean the rank
        if "alpha" not in layer and (rank := rank_of(layer)):
            layer["alpha"] = weights[f"{name}.alpha"] = torch.tensor(rank)

    def adapter_of(target: AdapterTarget) -> Adapter | None:
        layer = layers.get(target.name, {})
        if "w_norm" in layer:
            return NormAdapter(target)
        try:
            return make(target, layer) if rank_of(layer) is not None else None
        except UserError as error:
            raise UserError(*(f"{path}: {target.name}: {problem}" for problem in error.problems)) from error

    rules = learning_rate_rules(given, blocks.block_lr_weights(given, layout))
    network = kind(build_adapters(targets, adapter_of), rules)
    network.take_weights(weights, path)
    return network


def layers_of(weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The weights of a file by layer."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, value in weights.items():
        layer, _, end = name.partition(".")
        layers.setdefault(layer, {})[end] = value
    return layers


def layout_of(targets: list[AdapterTarget]) -> BlockLayout | None:
    return next((target.layout for target in targets if target.layout), None)


def dropouts_of(given: Mapping[str, Any], neuron_dropout: float | None) -> dict[str, float | None]:
    return {
        "dropout": given.get("dropout", neuron_dropout),
        "rank_dropout": given.get("rank_dropout"),
        "module_dropout": given.get("module_dropout"),
    }


def learning_rate_rules(given: Mapping[str, Any], block_weights: list[float] | None) -> LearningRateRules:
    general = given.get("loraplus_lr_ratio")
    ratios = {
        "textencoder": given.get("loraplus_text_encoder_lr_ratio", general),
        "unet": given.get("loraplus_unet_lr_ratio", general),
    }
    ratios = {name: ratio for name, ratio in ratios.items() if ratio is not None}
    return LearningRateRules(ratios, block_weights, given.get("network_reg_lrs", ()))
