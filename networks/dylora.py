"""DyLoRA (arXiv:2210.07558) as kohya trains it: at each forward pass one unit of neighbouring ranks learns.

All ranks make the output; with `truncate` only those up to the unit do, as in the paper, so that the network can be cut
to fewer ranks afterwards. Files are those of LoRA.
"""

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from library.errors import UserError
from library.families.base import AdapterTarget
from networks.base import AdapterNetwork, build_adapters, is_pointwise
from networks.building import learning_rate_rules, network_of_file
from networks.dylora_arguments import check_arguments as check_arguments
from networks.dylora_arguments import rank_problems, read
from networks.dylora_arguments import wants_convolutions as wants_convolutions
from networks.lora import rank_of
from networks.lora_adapter import LoraAdapter
from networks.lora_arguments import DEFAULT_RANK

logger = logging.getLogger(__name__)


class Units(nn.Module):
    """A matrix in parts along one dimension, each a parameter; in files it is one `weight`.

    Optimizers leave alone what has no gradient in a step, which they can only for whole parameters.
    """

    def __init__(self, weight: Tensor, unit: int, dim: int):
        super().__init__()
        self.unit, self.dim = unit, dim
        for number, part in enumerate(weight.detach().split(unit, dim)):
            self.register_parameter(f"unit{number}", nn.Parameter(part.clone()))

    @property
    def weight(self) -> Tensor:
        return torch.cat(list(self.parameters()), self.dim)

    def learning(self, chosen: int, truncate: bool) -> Tensor:
        """The matrix where only the chosen unit has gradients; without those behind it where that is wanted."""
        parts = [part if number == chosen else part.detach() for number, part in enumerate(self.parameters())]
        return torch.cat(parts[: chosen + 1] if truncate else parts, self.dim)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight if keep_vars else self.weight.detach()

    def _load_from_state_dict(
        self, state_dict: dict, prefix: str, local_metadata: dict, strict: bool, missing_keys: list, *others: list
    ) -> None:
        weight = state_dict.get(f"{prefix}weight")
        if weight is None:
            missing_keys.append(f"{prefix}weight")
            return
        with torch.no_grad():
            for own, part in zip(self.parameters(), weight.split(self.unit, self.dim), strict=True):
                own.copy_(part)


class DyloraAdapter(LoraAdapter):
    def __init__(self, target: AdapterTarget, rank: int, alpha: int | float, unit: int, truncate: bool):
        super().__init__(target, rank, alpha)
        self.num_units, self.truncate = rank // unit, truncate
        self.lora_down = Units(self.lora_down.weight, unit, 0)
        self.lora_up = Units(self.lora_up.weight, unit, 1)

    def anchor(self) -> Tensor:
        return next(self.lora_up.parameters())

    def learning_matrices(self) -> tuple[Tensor, Tensor]:
        if not self.training:
            return self.matrices()
        chosen = int(torch.randint(self.num_units, ()))  # on the host
        return tuple(matrix.learning(chosen, self.truncate) for matrix in (self.lora_down, self.lora_up))

    def flat_parameters(self) -> list[nn.Parameter]:
        return []  # the buffer's optimizer steps all parameters that ever had a gradient

    def rescale(self, factor: Tensor) -> None:
        for parameter in self.parameters():
            parameter.mul_(factor**0.5)

    def plus_parameters(self) -> list[nn.Parameter]:
        return list(self.lora_up.parameters())


def create_network(
    targets: list[AdapterTarget],
    network_dim: int | None,
    network_alpha: int | float | None,
    neuron_dropout: float | None = None,
    **network_args: str,
) -> AdapterNetwork:
    """A DyLoRA network on the targets; with `conv_dim`, which is the same rank, on 3x3 convolutions too."""
    given, rank = read(network_args), network_dim or DEFAULT_RANK
    if problems := rank_problems(rank, given):
        raise UserError(*problems)
    if "conv_alpha" in given:
        logger.warning("--network_args: conv_alpha: no effect, networks.dylora has one alpha, --network_alpha")

    def make(target: AdapterTarget) -> DyloraAdapter | None:
        if "conv_dim" not in given and not is_pointwise(target.layer):
            return None
        return DyloraAdapter(target, rank, network_alpha or rank, given.get("unit", 1), given.get("truncate", False))

    return AdapterNetwork(build_adapters(targets, make), learning_rate_rules(given, None))


def create_network_from_weights(
    targets: list[AdapterTarget], path: Path, neuron_dropout: float | None = None, **network_args: str
) -> AdapterNetwork:
    """The network of a file: its layers, ranks, alphas and weights; `unit` must divide every rank."""
    given = read(network_args)
    unit = given.get("unit", 1)

    def make(target: AdapterTarget, weights: Mapping[str, Tensor]) -> DyloraAdapter:
        if rank_of(weights) % unit:
            raise UserError(f"rank {rank_of(weights)} is no multiple of --network_args unit={unit}")
        alpha = weights["alpha"].flatten()[0].item()
        return DyloraAdapter(target, rank_of(weights), alpha, unit, given.get("truncate", False))

    return network_of_file(AdapterNetwork, targets, path, given, rank_of, make, unused=())
