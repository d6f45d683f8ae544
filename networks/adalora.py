"""AdaLoRA (arXiv:2303.10512): LoRA whose layers share a number of ranks, and each gets as many as it turns out to need.

The change of a weight W [out, in] is (alpha / rank) u P diag(lambda) Q, with P [out, r] and Q [r, in] kept nearly
orthonormal. At first every layer has more ranks than wanted; on the way the least important of all layers are put to 0.
The factor u, the power of two nearest to sqrt(out), lets lambda learn at the rates that LoRA takes: its steps change W
by as much as those of LoRA's matrix B. Which ranks matter most does not depend on it. Files are plain LoRA, with one
alpha for all layers: diffusers gives many layers the most common one.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.families.base import AdapterTarget
from library.network_files import read_weights, write_weights
from networks.adalora_arguments import DEFAULT_RANK, first_rank, read, schedule
from networks.adalora_arguments import check_arguments as check_arguments
from networks.base import (
    AdapterNetwork,
    build_adapters,
    is_pointwise,
    require_finite,
    require_same,
    under_our_names,
)
from networks.building import dropouts_of
from networks.hooks import Kept
from networks.lora_adapter import LoraAdapter
from networks.orthogonality import Orthogonality
from networks.rank_importance import RankImportance

ORTHOGONALITY = 0.1  # the weight of its term; the paper tries 0.1, 0.3 and 0.5


class AdaLoraAdapter(LoraAdapter):
    """P, lambda and Q of one layer, named lora_up, lora_lambda and lora_down; `file_alpha` is the alpha in files."""

    def __init__(
        self,
        target: AdapterTarget,
        first: int,
        rank: int,
        alpha: int | float,
        file_alpha: int | float,
        **dropouts: float | None,
    ):
        super().__init__(target, first, float((alpha or rank) * first / rank), **dropouts)
        self.file_alpha = float(file_alpha)
        nn.init.orthogonal_(self.lora_down.weight)
        nn.init.orthogonal_(self.lora_up.weight)
        self.wanted_rank = rank
        self.lora_lambda = nn.Parameter(torch.zeros(first))
        self.register_buffer("kept", torch.ones(first))  # 0 for ranks that are gone for good
        self.unit = 2.0 ** round(math.log2(len(self.lora_up.weight)) / 2)

    def matrices(self) -> tuple[Tensor, Tensor]:
        factors = self.lora_lambda * self.kept * self.unit
        up = self.lora_up.weight * factors.view(1, -1, *[1] * (self.lora_up.weight.ndim - 2))
        return self.lora_down.weight, up

    def flat_parameters(self) -> list[nn.Parameter]:
        return []  # what is computed with is no parameter

    def norm(self) -> Tensor:
        down, up = (matrix.flatten(1).float() for matrix in self.matrices())
        return ((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt() * abs(self.scale)

    def rescale(self, factor: Tensor) -> None:
        self.lora_lambda.mul_(factor)

    def file_weights(self) -> dict[str, Tensor]:
        """A plain LoRA of the ranks that are not 0; nothing where all are. B takes what `file_alpha` is off by."""
        (left,) = torch.nonzero(self.lora_lambda * self.kept, as_tuple=True)
        if not len(left):
            return {}
        down, up = (matrix.detach() for matrix in self.matrices())
        up = up[:, left] * (self.scale * len(left) / self.file_alpha)
        return {"lora_down.weight": down[left], "lora_up.weight": up, "alpha": torch.tensor(self.file_alpha)}

    def take_file_weights(self, weights: dict[str, Tensor]) -> None:
        """Be the change of a plain LoRA of any alpha, at the own scale; ranks that it lacks are 0 again.

        P takes the columns of B divided by the powers of two nearest to their lengths, and lambda the rest.
        """
        up = weights["lora_up.weight"].to(self.lora_up.weight).view(len(self.lora_up.weight), -1)
        count = up.shape[1]
        lengths = torch.exp2(up.norm(dim=0).clamp(min=torch.finfo(up.dtype).tiny).log2().round())
        self.lora_lambda.zero_()
        self.lora_lambda[:count] = lengths / self.unit * (weights["alpha"].item() / count / self.scale)
        self.kept.fill_(1)
        self.lora_up.weight.flatten(1)[:, :count] = up / lengths
        self.lora_down.weight[:count] = (
            weights["lora_down.weight"].to(self.lora_down.weight).view(count, *self.lora_down.weight.shape[1:])
        )


class AdaLoraNetwork(AdapterNetwork):
    """Ranks that all layers share; which of them stay is decided every few steps, on the device."""

    file_is_state_dict = False  # files are plain LoRA

    def __init__(self, adapters: dict[str, AdaLoraAdapter], arguments: dict[str, Any]):
        super().__init__(adapters)
        self.arguments = arguments
        self.importance: RankImportance | None = None  # while training

    def training_begins(self, num_steps: int, step: int) -> None:
        adapters = self.adapters()
        wanted = sum(adapter.wanted_rank for adapter in adapters)
        first = sum(adapter.rank for adapter in adapters)
        self.schedule = schedule(self.arguments, first, min(wanted, first), num_steps)
        self.importance = RankImportance(adapters, *(self.arguments.get(name, 0.85) for name in ("beta1", "beta2")))
        self.importance.step = step

    def penalty(self) -> Tensor | None:
        weight = self.arguments.get("orthogonality", ORTHOGONALITY)
        if not weight:
            return None
        ups = [adapter.lora_up.weight.flatten(1).T for adapter in self.adapters()]
        return weight * Orthogonality.apply(*ups, *(adapter.lora_down.weight.flatten(1) for adapter in self.adapters()))

    @torch.no_grad()
    def weights_updated(self, taken: Tensor | bool) -> None:
        importance = self.importance
        importance.step += 1
        if taken is not False and importance.step < self.schedule.end:
            importance.update()
        if not self.schedule.decides(importance.step):
            return
        marks = importance.chosen(self.schedule.budget(importance.step))
        torch._foreach_mul_([adapter.lora_lambda.data for adapter in self.adapters()], marks)
        if importance.step == self.schedule.end:
            torch._foreach_copy_([adapter.kept for adapter in self.adapters()], marks)

    def kept(self) -> dict[str, Kept]:
        return {"the importance of ranks (networks.adalora)": self.importance}

    def file_weights(self) -> dict[str, Tensor]:
        """The network as a plain LoRA."""
        layers = {name: adapter.file_weights() for name, adapter in self.named_children()}
        return {f"{name}.{key}": value for name, layer in layers.items() for key, value in layer.items()}

    def save_weights(self, path: Path, dtype: torch.dtype | None, metadata: dict[str, str] | None) -> None:
        write_weights(Path(path), self.file_weights(), dtype, metadata)

    @torch.no_grad()
    def load_weights(self, path: Path) -> None:
        """Take a plain LoRA of as many ranks or fewer; layers that it has not are as new."""
        adapters = dict(self.named_children())
        names = {adapter.other_name: name for name, adapter in adapters.items()}
        weights = under_our_names(read_weights(Path(path)), names)
        require_same(expected(adapters, weights), weights, path)
        for name, adapter in adapters.items():
            if f"{name}.alpha" in weights:
                adapter.take_file_weights({key: weights[f"{name}.{key}"] for key in FILE_KEYS})

    def check_saved(self, path: Path) -> int:
        weights = read_weights(Path(path))
        require_same(self.file_weights(), weights, path)
        require_finite(weights, path)
        return len(weights) // len(FILE_KEYS)


FILE_KEYS = "lora_down.weight", "lora_up.weight", "alpha"


def expected(adapters: dict[str, AdaLoraAdapter], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a file must have that has these layers, with its ranks where these are not too many."""
    own: dict[str, Tensor] = {}
    for name in {name.partition(".")[0] for name in weights} & adapters.keys():
        adapter, down = adapters[name], weights.get(f"{name}.lora_down.weight")
        count = adapter.rank if down is None or not down.ndim else min(len(down), adapter.rank)
        values = adapter.lora_down.weight[:count], adapter.lora_up.weight[:, :count], adapter.alpha
        own |= {f"{name}.{key}": value for key, value in zip(FILE_KEYS, values, strict=True)}
    return own


def create_network(
    targets: list[AdapterTarget],
    network_dim: int | None,
    network_alpha: int | float | None,
    neuron_dropout: float | None = None,
    **network_args: str,
) -> AdapterNetwork:
    """A network whose layers have `network_dim` ranks on average in the end, and `init_rank` at the start.

    Layers that are not Linear or 1x1 take `conv_dim` and `conv_alpha`, and are left alone without them.
    """
    given = read(network_args)
    pointwise = network_dim or DEFAULT_RANK, network_alpha or network_dim or DEFAULT_RANK
    convolutions = given.get("conv_dim", 0), given.get("conv_alpha", 1.0)

    def make(target: AdapterTarget) -> AdaLoraAdapter | None:
        rank, alpha = pointwise if is_pointwise(target.layer) else convolutions
        first = first_rank(rank, network_dim, given)
        dropouts = dropouts_of(given, neuron_dropout)
        return AdaLoraAdapter(target, first, rank, alpha, pointwise[1], **dropouts) if rank else None

    return AdaLoraNetwork(build_adapters(targets, make), given)


def wants_convolutions(network_args: dict[str, str]) -> bool:
    """Whether residual blocks and samplers are to be adapted too."""
    return "conv_dim" in read(network_args)
