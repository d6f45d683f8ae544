"""The `--network_args` of networks.dylora. Needs no torch."""

from typing import Any

from library.errors import UserError
from library.options.groups import NetworkOptions
from networks.arguments import read_arguments, truth
from networks.lora_arguments import DEFAULT_RANK, LORA_PLUS_ARGUMENTS, Shapes, another_rank

ARGUMENTS = {"conv_dim": int, "conv_alpha": float, "unit": int, "truncate": truth, **LORA_PLUS_ARGUMENTS}
DRAWS_NUMBERS = True  # in every forward pass


def read(network_args: dict[str, str]) -> dict[str, Any]:
    """The arguments with values of their types; a UserError names what is not for DyLoRA."""
    return read_arguments("networks.dylora", ARGUMENTS, network_args)


def check_arguments(network_args: dict[str, str]) -> None:
    """UserError where `--network_args` has something that is not for DyLoRA."""
    given = read(network_args)
    if given.get("unit", 1) < 1:
        raise UserError(f"--network_args: unit must be at least 1, got {given['unit']}")


def check_options(options: NetworkOptions, network_args: dict[str, str]) -> None:
    """UserError where other options do not go with DyLoRA or its arguments."""
    problems = rank_problems(options.network_dim or DEFAULT_RANK, read(network_args))
    if options.network_dropout:
        problems.append("--network_dropout: networks.dylora has no dropout; networks.lora has")
    if problems and not options.dim_from_weights:
        raise UserError(*problems)


def check_ranks(weights: Shapes, path: str, network_dim: int | None, network_args: dict[str, str]) -> None:
    """UserError where --network_weights, whose shapes these are, has another rank than the network is to have."""
    if other := other_ranks(weights, network_dim, network_args):
        raise UserError(f"--network_weights: {path} has {other} or --dim_from_weights")


def other_ranks(weights: Shapes, network_dim: int | None, network_args: dict[str, str]) -> str:
    """What to say of weights of another rank than the network is to have: "rank 8, but ...; give ..."."""
    return another_rank(weights, network_dim, "networks.lora")


def wants_convolutions(network_args: dict[str, str]) -> bool:
    """Whether residual blocks and samplers are to be adapted too."""
    return "conv_dim" in read(network_args)


def rank_problems(rank: int, given: dict[str, Any]) -> list[str]:
    """What stands against a rank: it is trained in units, and is that of convolutions too."""
    unit, conv_rank, problems = given.get("unit", 1), given.get("conv_dim", rank), []
    if rank % unit:
        problems.append(f"--network_args: unit={unit} must divide --network_dim, which is {rank}")
    if conv_rank != rank:
        problems.append(f"--network_args: conv_dim={conv_rank} must be --network_dim, {rank}: networks.dylora has one")
    return problems
