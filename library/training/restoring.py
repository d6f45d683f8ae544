"""Taking weights, optimizer, schedule, scaler and random generators from a state folder."""

import logging
from collections.abc import Iterable
from math import isclose
from pathlib import Path
from textwrap import shorten

from accelerate import Accelerator
from accelerate.checkpointing import load_accelerator_state
from accelerate.utils.other import load
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer

from library.errors import UserError, quoted_list
from library.training.resuming import OPTIMIZER_FILE, SCHEDULE_FILE, WEIGHTS_FILE, read_facts

logger = logging.getLogger(__name__)

ADDED_BY_STEPS = {"initial_lr", "d_denom", "d_hat", "g0_norm"}  # to optimizers' groups
ADDED_LATER = {"initial_lr", "decoupled_weight_decay"}  # by schedules; by torch 2.7


def load_state(accelerator: Accelerator, folder: Path) -> None:
    """Put a state into what the accelerator has prepared; UserError where it does not fit."""
    schedules = accelerator._schedulers if (folder / SCHEDULE_FILE).is_file() else []
    try:
        for network in accelerator._models:
            load_network(network, folder)
        for optimizer in accelerator._optimizers:
            load_optimizer(optimizer, folder)
        load_accelerator_state(folder, [], [], schedules, [], accelerator.process_index, accelerator.scaler)
    except UserError:
        raise
    except Exception as error:  # whatever a damaged or strange file raises
        raise misfit(folder, f"it does not fit or is not whole: {shorten(str(error), 300)}") from error


def misfit(folder: Path, problem: str) -> UserError:
    return UserError(f"--resume: the state in {folder} does not fit this run: {problem}")


def load_network(network: nn.Module, folder: Path) -> None:
    own = network.state_dict()
    weights = load_file(folder / WEIGHTS_FILE)
    if other := sorted(own.keys() ^ weights.keys()):
        raise misfit(folder, f"only one of them has {quoted_list(other, 3)}")
    weights = {name: in_shape_of(own[name], value) for name, value in weights.items()}
    for name, value in weights.items():
        if value.shape != own[name].shape:
            sizes = " and ".join("x".join(map(str, tensor.shape)) for tensor in (value, own[name]))
            raise misfit(folder, f"{name} is of another size, {sizes}")
        if name.endswith(".alpha") and not isclose(value, own[name], rel_tol=0.01):  # 16 bits round it
            raise misfit(folder, f"{name} is {value.item():g}, and this run's is {own[name].item():g}")
    network.load_state_dict(weights)


def load_optimizer(optimizer: Optimizer, folder: Path) -> None:
    given = [dict(group) for group in optimizer.param_groups]
    state = load(folder / OPTIMIZER_FILE, map_location="cpu")
    here, there = ([len(group["params"]) for group in groups] for groups in (given, state["param_groups"]))
    if here != there:
        raise misfit(folder, f"its optimizer has groups of {there} parameters, and this run's has {here}")
    there = state["param_groups"][0].keys()
    if lacking := given[0].keys() - there - ADDED_LATER:
        raise misfit(folder, f"it is of another optimizer than --optimizer_type names: it has no {listed(lacking)}")
    if (more := there - given[0].keys() - ADDED_BY_STEPS) and "optimizer_type" not in read_facts(folder):
        logger.warning("--resume: %s has settings of another optimizer: %s", folder / OPTIMIZER_FILE, listed(more))
    parameters = [parameter for group in given for parameter in group["params"]]
    for index, parameter in enumerate(parameters):
        entry = state["state"].get(index, {})
        for name, value in entry.items():
            if isinstance(value, Tensor):
                entry[name] = in_shape_of(parameter, value)
    optimizer.load_state_dict(state)
    for before, now in zip(given, optimizer.param_groups, strict=True):
        rates = [group.get("initial_lr", group["lr"]) for group in (before, now)]
        if rates[0] != rates[1]:
            logger.warning("--resume: training goes on at the state's learning rate, %s, not at %s", rates[1], rates[0])
            return


def listed(names: Iterable[str]) -> str:
    return quoted_list(sorted(names))


def in_shape_of(own: Tensor, value: Tensor) -> Tensor:
    """Kohya's scripts have convolutions [r, c, 1, 1] for single files of SD 2.x where there are linear layers here."""
    is_same_but_for_ones = value.ndim == 4 and own.ndim == 2 and value.shape == (*own.shape, 1, 1)
    return value.reshape(own.shape) if is_same_but_for_ones else value
