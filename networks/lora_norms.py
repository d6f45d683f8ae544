"""The norms of many LoRA changes: two small products for each, and a few operations for all."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Lora(Protocol):
    """What is asked here of a LoRA adapter."""

    scale: float

    def matrices(self) -> tuple[Tensor, Tensor]: ...  # A and B


def norms_of(adapters: Sequence[Lora]) -> Tensor:
    """The Frobenius norms of changes s B A, [adapters], on their device and without waiting for it."""
    pairs = [tuple(matrix.flatten(1).float() for matrix in adapter.matrices()) for adapter in adapters]
    places: dict[int, list[int]] = {}
    for place, (down, _) in enumerate(pairs):
        places.setdefault(len(down), []).append(place)
    norms: dict[int, Tensor] = {}
    for rank, group in places.items():
        norms |= zip(group, _of_rank([pairs[place] for place in group], rank).unbind(), strict=True)
    return torch.stack([norms[place] * abs(adapter.scale) for place, adapter in enumerate(adapters)])


def _of_rank(pairs: Sequence[tuple[Tensor, Tensor]], rank: int) -> Tensor:
    """|B A| of pairs A, B of one rank, from matrices as small as it is: |B A|^2 = tr(B^T B A A^T)."""
    of_down, of_up = torch.empty(2, len(pairs), rank, rank, device=pairs[0][0].device)
    for (down, up), down_square, up_square in zip(pairs, of_down, of_up, strict=True):
        torch.mm(down, down.T, out=down_square)
        torch.mm(up.T, up, out=up_square)
    squares = (of_down * of_up).sum(dim=(1, 2))  # both are symmetric
    return squares.clamp(min=0).sqrt()
