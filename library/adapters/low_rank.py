"""Changes of weight as products of two thin matrices, and the closest of a smaller rank (Eckart and Young, 1936)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from library.adapters.file import AdapterLayer

NO_CHANGE = 1e-6  # a largest singular value up to here is taken for 0


@dataclass(frozen=True)
class Factors:
    """A change up @ down of a weight [out, in, kernel]."""

    up: Tensor  # [out, r]
    down: Tensor  # [r, in * kernel]
    inside: tuple[int, ...]  # the weight's sizes behind the first: in, kernel

    @property
    def rank(self) -> int:
        return len(self.down)

    def tensors(self, name: str, alpha: float | None = None) -> dict[str, Tensor]:
        """As LoRA under kohya's names; alpha is the rank unless given, and the change is divided by what it does."""
        alpha = self.rank if alpha is None else alpha
        kernel = [1] * (len(self.inside) - 1)
        share = math.sqrt(self.rank / alpha) if alpha > 0 else 1.0
        return {
            f"{name}.alpha": torch.tensor(float(alpha)),
            f"{name}.lora_down.weight": (share * self.down).reshape(self.rank, *self.inside).cpu(),
            f"{name}.lora_up.weight": (share * self.up).reshape(-1, self.rank, *kernel).cpu(),
        }


@dataclass(frozen=True)
class Spectrum:
    """The singular value decomposition of a change [out, in * kernel]."""

    left: Tensor  # [out, n]
    values: Tensor  # [n], from large to small
    right: Tensor  # [n, in * kernel]
    inside: tuple[int, ...]

    def cut(self, rank: int) -> Factors:
        """The closest change of at most this rank, in equal parts on both factors, which half precision holds best."""
        rank = max(1, min(rank, len(self.values)))
        root = self.values[:rank].sqrt()
        return Factors(self.left[:, :rank] * root, root[:, None] * self.right[:rank], self.inside)

    def error(self, rank: int) -> tuple[float, float]:
        """The squares of what is lost at this rank, and of all there is."""
        squares = self.values.double().square()
        return float(squares[rank:].sum()), float(squares.sum())


def plain_factors(layer: AdapterLayer, ratio: float = 1.0) -> Factors | None:
    """The factors of a LoRA, times the ratio; a core between them goes into the second. None for other algorithms."""
    if layer.algorithm != "lora" or layer.is_dora:
        return None
    tensors = layer.tensors()
    up, down = tensors["up"].flatten(1), tensors["down"]
    alpha = layer.alpha
    scale = ratio if alpha is None else ratio * alpha / len(down)
    if "mid" in tensors:
        down = torch.einsum("mn...,ni->mi...", tensors["mid"], down.flatten(1))
    root = math.sqrt(abs(scale))
    return Factors(math.copysign(root, scale) * up, root * down.flatten(1), tuple(down.shape[1:]))


def put_side_by_side(parts: Sequence[Factors]) -> Factors:
    """The exact sum of changes: its rank is the sum of theirs."""
    ups, downs = [part.up for part in parts], [part.down for part in parts]
    return Factors(torch.cat(ups, dim=1), torch.cat(downs), parts[0].inside)


def spectrum_of_factors(factors: Factors) -> Spectrum:
    """The decomposition of a product of thin matrices, by that of a matrix as small as their rank."""
    q_up, r_up = torch.linalg.qr(factors.up)
    q_down, r_down = torch.linalg.qr(factors.down.T)
    left, values, right = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    return Spectrum(q_up @ left, values, right @ q_down.T, factors.inside)


def spectrum_of(change: Tensor) -> Spectrum:
    """The decomposition of a whole change [out, in, kernel], of a square part of it: several times faster."""
    matrix = change.flatten(1)
    is_wide = matrix.shape[0] < matrix.shape[1]
    q, r = torch.linalg.qr(matrix.T if is_wide else matrix)
    left, values, right = torch.linalg.svd(r, full_matrices=False)
    left = q @ left
    if is_wide:
        left, right = right.T, left.T
    return Spectrum(left, values, right, tuple(change.shape[1:]))


def rank_by_ratio(values: Tensor, wanted: float) -> int:
    """How many singular values are above the largest divided by `wanted`."""
    return int((values > values[0] / wanted).sum())


def rank_by_sum(values: Tensor, wanted: float) -> int:
    """The smallest rank that keeps this share of the sum of singular values."""
    return _reaching(values, wanted)


def rank_by_norm(values: Tensor, wanted: float) -> int:
    """The smallest rank that keeps this share of the Frobenius norm."""
    return _reaching(values.square(), wanted**2)


def _reaching(parts: Tensor, share: float) -> int:
    sums = parts.double().cumsum(0)
    return int((sums < share * sums[-1]).sum()) + 1


METHODS: dict[str, Callable[[Tensor, float], int]] = {  # as --dynamic_method names them
    "sv_ratio": rank_by_ratio,
    "sv_fro": rank_by_norm,
    "sv_cumulative": rank_by_sum,
}


def chosen_rank(values: Tensor, at_most: int, method: str | None, parameter: float | None) -> int:
    """The rank of a layer: by a method where one is named, never above `at_most`; 1 where nothing changes."""
    at_most = min(at_most, len(values))
    if values[0] <= NO_CHANGE:
        return 1
    return min(METHODS[method](values, parameter), at_most) if method else at_most
