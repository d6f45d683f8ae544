"""The network of a run: of which algorithm, on which layers, of which ranks, from which files."""

import importlib
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import zip_longest
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from library.errors import UserError
from library.families.base import AdapterTarget, ModelFamily
from library.families.detect import read_shapes
from library.network_choice import check_by_rules
from library.network_rules import rules_without_torch
from library.options.groups import NetworkOptions, TrainNetworkOptions
from library.training.resuming import check_state

logger = logging.getLogger(__name__)

EXTERNAL = "networks.external"


def load_algorithm(name: str) -> Any:
    """The algorithm of --network_module: one of our own takes layers, one of another project takes whole models."""
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"--network_module {name} cannot be imported: {error}") from error
    if hasattr(module, "wants_convolutions"):
        return module
    if not hasattr(module, "create_network"):
        raise UserError(f"--network_module {name} makes no networks: it has no function create_network")
    return importlib.import_module(EXTERNAL).ExternalAlgorithm(module)


def check_arguments(
    algorithm: Any, options: TrainNetworkOptions, arguments: dict[str, str], state: Path | None = None
) -> None:
    """UserError for what the algorithm cannot take and only its own module can tell, of a state to resume too."""
    if hasattr(algorithm, "network_on_models"):
        algorithm.check_arguments(arguments)
        if not options.dim_from_weights:
            algorithm.check_ranks(options.network_dim, arguments)
    elif not rules_without_torch(algorithm.__name__):
        path = options.network_weights
        check_by_rules(algorithm, options, read_shapes(Path(path), "--network_weights") if path else None)
        if state:
            check_state(options, state, algorithm)


def build_network(algorithm: Any, family: ModelFamily, options: NetworkOptions, arguments: dict[str, str]) -> nn.Module:
    """The network on the layers that are to be trained, attached, with --network_weights where given."""
    with naming_flag("network_weights", options.network_weights):
        if hasattr(algorithm, "network_on_models"):
            network = algorithm.network_on_models(family.kohya_models(), options, arguments)
        else:
            create = network_of_file if options.dim_from_weights else new_network
            network = create(algorithm, family, options, arguments)
            network.apply_to()
    if not network.adapters():
        raise UserError(
            "the network has no layers: --network_args leave rank 0 or learning rate 0 in all of them, "
            "or a preset that names none of this model's"
        )
    return network


@contextmanager
def naming_flag(flag: str, path: str | None) -> Iterator[None]:
    """Put the flag before problems that begin with the path of the file it names."""
    try:
        yield
    except UserError as error:
        about = str(Path(path)) if path else None
        problems = (f"--{flag}: {text}" if about and text.startswith(about) else text for text in error.problems)
        raise UserError(*problems) from error


def new_network(
    algorithm: ModuleType, family: ModelFamily, options: NetworkOptions, arguments: dict[str, str]
) -> nn.Module:
    """The network of the ranks that are given."""
    if hasattr(algorithm, "needs_base_weights") and algorithm.needs_base_weights(arguments):
        family.keep_weights()  # so that they are there before VAE and text encoders have left
    norms = hasattr(algorithm, "wants_norms") and algorithm.wants_norms(arguments)
    all_targets = family.adapter_targets(algorithm.wants_convolutions(arguments), norms)
    targets = wanted_targets(all_targets, options)
    network = algorithm.create_network(
        targets, options.network_dim, options.network_alpha, options.network_dropout, **arguments
    )
    if options.network_weights:
        network.load_weights(Path(options.network_weights))
    return network


def network_of_file(
    algorithm: ModuleType, family: ModelFamily, options: NetworkOptions, arguments: dict[str, str]
) -> nn.Module:
    """The network whose layers, ranks and alphas are those of --network_weights."""
    if not hasattr(algorithm, "create_network_from_weights"):
        raise UserError(f"--dim_from_weights is not for --network_module {options.network_module}")
    targets = wanted_targets(family.adapter_targets(True, norms=hasattr(algorithm, "wants_norms")), options)
    path = Path(options.network_weights)
    network = algorithm.create_network_from_weights(targets, path, options.network_dropout, **arguments)
    logger.info("%d layers, their ranks and alphas are those of %s", len(network.adapters()), path)
    return network


def merge_base_weights(algorithm: ModuleType, family: ModelFamily, options: NetworkOptions) -> None:
    """Add the networks of --base_weights to the model's weights as these are read, for good.

    Every key of a file must be used.
    """
    paths = options.base_weights or []
    for path, multiplier in zip_longest(paths, options.base_weights_multiplier or [], fillvalue=1.0):
        with naming_flag("base_weights", path):
            targets = list(family.adapter_targets(conv=True, norms=hasattr(algorithm, "wants_norms")))
            network = algorithm.create_network_from_weights(targets, Path(path))
        adapters = network.adapters()
        family.change_layers({each.base: partial(merge_one, each, multiplier, family.device) for each in adapters})
        logger.info("merged into the base model: %d layers of %s, times %g", len(adapters), path, multiplier)


def merge_one(adapter: nn.Module, multiplier: float, device: torch.device) -> None:
    adapter.to(device, torch.float32).merge(multiplier)


def wanted_targets(targets: Iterable[AdapterTarget], options: NetworkOptions) -> list[AdapterTarget]:
    """Without the parts that the user does not train."""
    if options.network_train_unet_only:
        return [target for target in targets if target.part == "unet"]
    if options.network_train_text_encoder_only:
        return [target for target in targets if target.part != "unet"]
    return list(targets)
