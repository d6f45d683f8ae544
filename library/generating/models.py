"""A model to draw with, and networks on it: the same classes as in training, so that pictures are the same."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import PartialState
from torch import nn

from library.errors import UserError
from library.families import family_class
from library.families.base import ModelFamily
from library.generating.preparation import NetworkFile
from library.layers.onednn import compute_with_onednn
from library.options.derived import network_arguments
from library.options.groups import ModelOptions, NetworkOptions
from library.recipes.network_building import load_algorithm, naming_flag
from library.training.on_cpu import keep_freed_memory

logger = logging.getLogger(__name__)


def load_family(name: str, options: ModelOptions, dtype: torch.dtype) -> ModelFamily:
    """The model of a family on the device of this computer."""
    device = PartialState().device
    if dtype == torch.float16 and device.type == "cpu":
        raise UserError("--fp16 needs a GPU, and none is usable here; give --bf16 or neither")
    return family_class(name)(options, device, dtype)


def network_of(family: ModelFamily, file: NetworkFile, flag: str = "network_weights") -> nn.Module:
    """The network of a file, made for the model and not attached yet; one of another project is attached."""
    options = NetworkOptions(
        network_module=file.module,
        network_weights=str(file.path),
        network_args=list(file.arguments),
        dim_from_weights=True,
    )
    algorithm, arguments = load_algorithm(file.module), network_arguments(options)
    with naming_flag(flag, str(file.path)):
        if hasattr(algorithm, "network_on_models"):
            network = algorithm.network_on_models(family.kohya_models(), options, arguments)
        else:
            targets = list(family.adapter_targets(conv=True, norms=hasattr(algorithm, "wants_norms")))
            network = algorithm.create_network_from_weights(targets, file.path, None, **arguments)
    if not network.adapters():
        raise UserError(f"--{flag}: {file.path} has no weights for this model")
    return network.to(family.device, torch.float32).eval()


def is_removable(network: nn.Module) -> bool:
    """Whether a network can be taken off the model again; those of other projects stay."""
    return hasattr(network, "apply_to") and hasattr(network, "remove")


def has_text(network: nn.Module) -> bool:
    """Whether a network changes text encoders."""
    return any(adapter.part != "unet" for adapter in network.adapters())


def merge(family: ModelFamily, file: NetworkFile) -> None:
    """Add a network to the model's weights, for good."""
    family.keep_weights()
    network = network_of(family, file)
    if not hasattr(network, "merge"):
        raise UserError(f"--network_merge is not for {file.module}: its networks cannot be merged here")
    network.merge(file.multiplier)
    logger.info("merged: %s, times %g", file.path, file.multiplier)


def prepare(family: ModelFamily, text_too: bool, change: Callable[[nn.Module], Any] | None = None) -> None:
    """Have the model compute as it does while it is trained; before any network is attached."""
    if change:
        change(family.unet)
    if family.device.type == "cpu":
        keep_freed_memory()
        for model in (family.unet, *(family.text_encoders if text_too else ())):
            compute_with_onednn(model)


@contextmanager
def attached(networks: list[nn.Module], multipliers: list[float]) -> Iterator[None]:
    """A block in which networks are on the model."""
    for network, multiplier in zip(networks, multipliers, strict=True):
        network.set_multiplier(multiplier)
        if is_removable(network):
            network.apply_to()
    try:
        yield
    finally:
        for network in reversed(networks):
            if is_removable(network):
                network.remove()
