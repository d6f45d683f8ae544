"""LoRA (arXiv:2106.09685) for Linear layers and convolutions, and LoCon: LoRA on 3x3 convolutions too (`conv_dim`).

The change of a weight W [out, in] is (alpha / rank) B A, with A [rank, in] random and B [out, rank] zero at the start.
"""

import logging
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from library.errors import UserError
from library.families.base import AdapterTarget
from networks.base import AdapterNetwork
from networks.building import dropouts_of, network_of_file, network_of_ranks
from networks.decomposed import Decomposed, is_of_outputs
from networks.lora_adapter import LoraAdapter, LoraNetwork
from networks.lora_arguments import OF_FILE, read
from networks.lora_arguments import check_arguments as check_arguments
from networks.lora_arguments import needs_base_weights as needs_base_weights
from networks.lora_arguments import wants_convolutions as wants_convolutions
from networks.lora_arguments import wants_norms as wants_norms
from networks.pissa import PissaAdapter, PissaNetwork

logger = logging.getLogger(__name__)


class DoraAdapter(Decomposed, LoraAdapter):
    """DoRA of one layer, with dora_scale beside them."""


class OrthogonalAdapter(LoraAdapter):
    """The rows of A are at right angles to each other, and as long as kohya's are in the mean."""

    def initialise(self) -> None:
        nn.init.orthogonal_(self.lora_down.weight, gain=1 / math.sqrt(3))
        nn.init.zeros_(self.lora_up.weight)


INITIALISATIONS = {"kaiming": LoraAdapter, "orthogonal": OrthogonalAdapter, "pissa": PissaAdapter}


def create_network(
    targets: list[AdapterTarget],
    network_dim: int | None,
    network_alpha: int | float | None,
    neuron_dropout: float | None = None,
    **network_args: str,
) -> AdapterNetwork:
    """A LoRA network on the targets; `network_args` are kohya's and our own, as strings."""
    given = read(network_args)
    dropouts = dropouts_of(given, neuron_dropout)
    begins = given.get("init", "kaiming")
    make = partial(INITIALISATIONS[begins], train_bias=given.get("train_bias", False), **dropouts)
    if given.get("dora"):
        make = partial(DoraAdapter, on_output=given.get("wd_on_output", False), **dropouts)
    warn_of_consumers(given)
    kind = PissaNetwork if begins == "pissa" else LoraNetwork
    network = network_of_ranks(kind, targets, network_dim, network_alpha, given, make)
    return perturbed(network, given)


def create_network_from_weights(
    targets: list[AdapterTarget], path: Path, neuron_dropout: float | None = None, **network_args: str
) -> AdapterNetwork:
    """The network of a file, LoRA or DoRA by layer; of `network_args` what the file does not know still counts."""
    given = read(network_args)
    dropouts = dropouts_of(given, neuron_dropout)

    def make(target: AdapterTarget, weights: Mapping[str, Tensor]) -> LoraAdapter:
        if "dora_scale" in weights:
            if "ggpo_sigma" in given:
                raise UserError("a layer of DoRA, which --network_args ggpo_sigma is not for")
            is_on_output = is_of_outputs(weights["dora_scale"])
            return of_weights(partial(DoraAdapter, on_output=is_on_output, **dropouts), target, weights)
        return of_weights(partial(LoraAdapter, **dropouts), target, weights)

    network = network_of_file(LoraNetwork, targets, path, given, rank_of, make, OF_FILE)
    return perturbed(network, given)


def perturbed(network: LoraNetwork, given: Mapping[str, Any]) -> LoraNetwork:
    """The network, trained with the perturbations that are given."""
    if given.get("ggpo_sigma"):
        network.perturb(given["ggpo_sigma"], given["ggpo_beta"])
    return network


def of_weights(make: Callable[..., LoraAdapter], target: AdapterTarget, weights: Mapping[str, Tensor]) -> LoraAdapter:
    """An adapter with the rank, the alpha and the bias that a layer of a file has."""
    bias = {"train_bias": True} if "diff_b" in weights else {}
    return make(target, rank_of(weights), weights["alpha"].flatten()[0].item(), **bias)


def rank_of(weights: Mapping[str, Tensor]) -> int | None:
    """The rank of a layer of a file."""
    down = weights.get("lora_down.weight")
    return len(down) if down is not None and down.ndim and len(down) else None


def warn_of_consumers(given: dict[str, Any]) -> None:
    """Lines about what other programs do not read."""
    for argument, keys in {"train_norm": "w_norm and b_norm", "train_bias": "diff_b"}.items():
        if given.get(argument):
            logger.warning(
                "--network_args: %s: diffusers refuses files with %s; ComfyUI and the WebUI take them", argument, keys
            )
