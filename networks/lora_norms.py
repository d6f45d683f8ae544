"""The norms of many LoRA changes: two small products for each, and a few operations for all."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn


class Lora(Protocol):
    """What is asked here of a LoRA adapter."""

    rank: int
    lora_down: nn.Module
    lora_up: nn.Module
    alpha: Tensor


def norms_of(adapters: Sequence[Lora]) -> Tensor:
    """The Frobenius norms of changes (alpha / rank) B A, [adapters], on their device and without waiting for it."""
    places: dict[int, list[int]] = {}
    for place, adapter in enumerate(adapters):
        places.setdefault(adapter.rank, []).append(place)
    of_each = {}
    for rank, group in places.items():
        of_each |= dict(zip(group, _of_rank([adapters[place] for place in group], rank).unbind(), strict=True))
    return torch.stack([of_each[place] for place in range(len(adapters))])


def _of_rank(adapters: Sequence[Lora], rank: int) -> Tensor:
    """Those of one rank, from matrices as small as it is: |B A|^2 = tr(B^T B A A^T)."""
    of_down, of_up = torch.empty(2, len(adapters), rank, rank, device=adapters[0].lora_down.weight.device)
    for adapter, down_square, up_square in zip(adapters, of_down, of_up, strict=True):
        down, up = adapter.lora_down.weight.flatten(1).float(), adapter.lora_up.weight.flatten(1).float()
        torch.mm(down, down.T, out=down_square)
        torch.mm(up.T, up, out=up_square)
    squares = (of_down * of_up).sum(dim=(1, 2))  # both are symmetric
    alphas = torch.stack([adapter.alpha for adapter in adapters]).float()
    return squares.clamp(min=0).sqrt() * (alphas / rank).abs()
