"""The `--network_args` of networks.adalora. Needs no torch."""

from dataclasses import dataclass
from math import ceil
from typing import Any

from library.errors import UserError
from library.options.groups import NetworkOptions
from networks.arguments import read_arguments

ARGUMENTS = {
    "init_rank": int,
    "t_init": int,
    "t_final": int,
    "delta_t": int,
    "orthogonality": float,
    "beta1": float,
    "beta2": float,
    "conv_dim": int,
    "conv_alpha": float,
    "dropout": float,
    "rank_dropout": float,
    "module_dropout": float,
}
DEFAULT_RANK = 4
LARGER = 1.5  # than the rank that is wanted in the end is the one at the start, as in the paper
Shapes = dict[str, tuple[int, ...] | None]  # of weights by their names


def read(network_args: dict[str, str]) -> dict[str, Any]:
    """The arguments with values of their types; a UserError names what is not for AdaLoRA."""
    return read_arguments("networks.adalora", ARGUMENTS, network_args)


def check_arguments(network_args: dict[str, str]) -> None:
    """UserError where `--network_args` has something that is not for AdaLoRA."""
    given = read(network_args)
    problems = [
        f"--network_args: {name} must be {lowest} or more, got {given[name]}"
        for name, lowest in {"init_rank": 1, "t_init": 0, "t_final": 0, "delta_t": 1, "orthogonality": 0}.items()
        if given.get(name, lowest) < lowest
    ]
    problems += [
        f"--network_args: {name} must be above 0 and below 1, got {given[name]}"
        for name in ("beta1", "beta2")
        if not 0 < given.get(name, 0.5) < 1
    ]
    if "conv_alpha" in given and "conv_dim" not in given:
        problems.append("--network_args: conv_alpha needs conv_dim")
    if problems:
        raise UserError(*problems)


def check_options(options: NetworkOptions, network_args: dict[str, str]) -> None:
    """UserError where other options do not go with AdaLoRA."""
    if options.dim_from_weights:
        raise UserError(
            "--dim_from_weights: not with networks.adalora, whose layers share the ranks of --network_dim; give "
            "--network_module networks.lora to train on with the ranks of the file as they are, or --network_dim "
            "instead to have them chosen anew"
        )


def check_steps(network_args: dict[str, str], num_steps: int) -> None:
    """UserError where a run of so many steps leaves none to choose ranks in."""
    schedule(read(network_args), 1, 1, num_steps)


def first_rank(rank: int, network_dim: int | None, given: dict[str, Any]) -> int:
    """The rank at the start of a layer that is to have this one on average in the end."""
    wanted = network_dim or DEFAULT_RANK
    return ceil(rank * given.get("init_rank", LARGER * wanted) / wanted)


def check_ranks(weights: Shapes, path: str, network_dim: int | None, network_args: dict[str, str]) -> None:
    """UserError where --network_weights, whose shapes these are, has more ranks than the network begins with."""
    first = first_rank(network_dim or DEFAULT_RANK, network_dim, read(network_args))
    largest = max(ranks_of(weights), default=0)
    if largest > first:
        raise UserError(
            f"--network_weights: {path} has ranks up to {largest}, and this network begins with {first}; "
            f"give --network_args init_rank={largest}"
        )


def other_ranks(weights: Shapes, network_dim: int | None, network_args: dict[str, str]) -> str:
    """What to say of a state of other ranks than the network begins with."""
    first, found = first_rank(network_dim or DEFAULT_RANK, network_dim, read(network_args)), ranks_of(weights)
    if not found or found == {first}:
        return ""
    return f"rank {max(found)} at the start, but here it is {first}; give --network_args init_rank={max(found)}"


def ranks_of(weights: Shapes) -> set[int]:
    """Those of layers that are no 3x3 convolutions."""
    return {
        shape[0]
        for name, shape in weights.items()
        if name.endswith(".lora_down.weight") and shape and all(side == 1 for side in shape[2:])
    }


@dataclass(frozen=True)
class Schedule:
    """How many ranks all layers have together at each step (arXiv:2303.10512, eq. 12)."""

    first: int
    last: int
    begin: int  # the step until which all stay
    end: int  # the step from which those that are left stay
    every: int  # steps between two decisions

    def budget(self, step: int) -> int:
        """After this step, 1 is the first."""
        if step <= self.begin:
            return self.first
        if step >= self.end:
            return self.last
        left = 1 - (step - self.begin) / (self.end - self.begin)
        return int(self.last + (self.first - self.last) * left**3)

    def decides(self, step: int) -> bool:
        """Whether ranks are chosen after this step."""
        return step == self.end or (self.begin < step < self.end and step % self.every == 0)


def schedule(given: dict[str, Any], first: int, last: int, num_steps: int) -> Schedule:
    """That of a run; where the arguments leave it open, a tenth of the steps is the beginning, and four the end."""
    begin = given.get("t_init", num_steps // 10)
    end = num_steps - given.get("t_final", num_steps * 4 // 10)
    every = given.get("delta_t", min(max(num_steps // 100, 1), 100))
    if begin >= end:
        raise UserError(
            f"--network_args: between t_init ({begin} steps) and t_final ({num_steps - end} steps) none of the "
            f"{num_steps} steps is left to choose ranks in; give smaller ones"
        )
    return Schedule(first, last, begin, end, every)
