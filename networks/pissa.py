"""PiSSA (arXiv:2404.02948): A and B begin as the weight's own largest singular vectors, and so learn those first.

The base stays whole: what is added is B A less its beginning B0 A0, as (B - B0) A + B0 (A - A0), which is exactly 0 at
the start. In files this is a plain LoRA of twice the rank.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.errors import UserError
from library.families.base import AdapterTarget
from networks.lora_adapter import LoraAdapter, LoraNetwork

OVERSAMPLING, POWER_ITERATIONS = 8, 16


class PissaAdapter(LoraAdapter):
    """A and B of one layer, with their beginnings beside them."""

    def __init__(self, target: AdapterTarget, rank: int, alpha: int | float, *others: Any, **dropouts: Any):
        super().__init__(target, rank, alpha, *others, **dropouts)
        smallest = min(self.base.weight.flatten(1).shape)
        if rank > smallest:
            raise UserError(f"--network_args: init=pissa: rank {rank} is more than the {smallest} that {self.name} has")
        if not self.base.weight.is_meta:  # it has values
            down, up = principal(self.base.weight, rank, self.scale)
            for matrix, value in ((self.lora_down.weight, down), (self.lora_up.weight, up)):
                matrix.data.copy_(value.view(matrix.shape))
        self.register_buffer("first_down", self.lora_down.weight.detach().clone())
        self.register_buffer("first_up", self.lora_up.weight.detach().clone())

    def matrices(self) -> tuple[Tensor, Tensor]:
        """A and B of twice the rank."""
        down, up = self.lora_down.weight, self.lora_up.weight
        return torch.cat([down, down - self.first_down]), torch.cat([up - self.first_up, self.first_up], 1)

    def _mask(self, hidden: Tensor) -> Tensor:
        """A rank falls out with its beginning."""
        dim = 1 if hidden.ndim == 4 else -1
        mask = super()._mask(hidden.narrow(dim, 0, self.rank))
        return torch.cat([mask, mask], dim)

    def flat_parameters(self) -> list[nn.Parameter]:
        return []

    def file_weights(self) -> dict[str, Tensor]:
        down, up = self.matrices()
        weights = {"alpha": 2 * self.alpha, "lora_down.weight": down.detach(), "lora_up.weight": up.detach()}
        return weights if self.diff_b is None else weights | {"diff_b": self.diff_b.detach()}


class PissaNetwork(LoraNetwork):
    """Its state has A, B and their beginnings; its file the change of the base."""

    file_is_state_dict = False

    def file_weights(self) -> dict[str, Tensor]:
        weights = {}
        for name, adapter in self.named_children():
            own = adapter.file_weights() if isinstance(adapter, PissaAdapter) else adapter.state_dict()
            weights |= {f"{name}.{key}": value for key, value in own.items()}
        return weights

    def take_weights(self, weights: dict[str, Tensor], path: Path) -> None:
        raise UserError(f"{path} cannot be trained on with init=pissa: give --dim_from_weights without it")


@torch.no_grad()
def principal(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank] whose product times `scale` is a weight's best approximation of this rank.

    The singular vectors are found at random (arXiv:0909.4061), with power iterations that make them as good as exact.
    """
    matrix = weight.detach().flatten(1).float()
    num_vectors = min(rank + OVERSAMPLING, *matrix.shape)
    left, values, right = torch.svd_lowrank(matrix, num_vectors, niter=POWER_ITERATIONS)
    roots = (values[:rank] / scale).sqrt()
    return (right[:, :rank] * roots).T, left[:, :rank] * roots
