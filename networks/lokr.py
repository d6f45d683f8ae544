"""LoKr (arXiv:2309.14859): a change that is the Kronecker product of two small matrices, which may be of low rank.

The change of a weight W [a b, c d] is (alpha / rank) C (x) D, with C [a, c] and D [b, d ...], zero at the start, so

    (C (x) D) x = C X D^T,  where X [c, d] is x in rows of d,

and the product itself is never made. Names and first values are those of LyCORIS: lokr_w1 for C, or lokr_w1_a and
lokr_w1_b whose product it is, lokr_w2 for D, and lokr_t2 for the core of a convolution's D (`use_tucker`).
"""

import math
from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.families.base import AdapterTarget
from networks.base import AdapterNetwork
from networks.building import dropouts_of, network_of_file, network_of_ranks
from networks.factored import FactoredAdapter, Shapes, shapes_of, sizes_of, with_core
from networks.kronecker_function import KroneckerFunction, Parts, kronecker_change
from networks.lokr_arguments import FILE_KNOWS, STRUCTURE, read
from networks.lokr_arguments import check_arguments as check_arguments
from networks.lokr_arguments import wants_convolutions as wants_convolutions

NAMES = "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"


class LokrAdapter(FactoredAdapter):
    """The change of one layer. Where both matrices are whole there is no rank, and the scale is 1."""

    def __init__(self, target: AdapterTarget, shapes: Shapes, rank: int, alpha: int | float, **dropouts: float | None):
        super().__init__(target, shapes, rank, rank if is_whole(shapes) else alpha, **dropouts)
        for parameter in self.own().values():
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
        nn.init.zeros_(self.lokr_w2 if "lokr_w2" in shapes else self.lokr_w2_b)

    def refresh(self) -> None:
        self.scale = 1.0 if is_whole(self.own()) else self.alpha.item() / self.rank

    def product(self, factors: Mapping[str, Tensor]) -> Tensor:
        outputs, inputs, kernel = sizes_of(self.base)
        first, second = first_of(factors), self._second(factors)
        return torch.kron(first, second.flatten(1)).view(outputs, inputs, *kernel)

    def changed_output(self, x: Tensor, factors: Mapping[str, Tensor], scale: float) -> Tensor:
        return KroneckerFunction.apply(x, self.base, scale, *self._parts(factors))

    def change(self, x: Tensor, factors: Mapping[str, Tensor]) -> Tensor:
        return kronecker_change(x, self._parts(factors), self.base, F.linear)

    def _parts(self, factors: Mapping[str, Tensor]) -> Parts:
        if "lokr_w2" in factors or "lokr_t2" in factors:
            return first_of(factors), self._second(factors), None
        down, up = factors["lokr_w2_b"], factors["lokr_w2_a"]
        _, _, kernel = sizes_of(self.base)
        return first_of(factors), down.view(len(down), -1, *kernel), up

    def _second(self, factors: Mapping[str, Tensor]) -> Tensor:
        """D in the shape of a weight."""
        if "lokr_w2" in factors:
            return factors["lokr_w2"]
        a, b = factors["lokr_w2_a"], factors["lokr_w2_b"]
        if "lokr_t2" in factors:
            return with_core(factors["lokr_t2"], a, b)
        _, _, kernel = sizes_of(self.base)
        return (a @ b.flatten(1)).view(len(a), -1, *kernel)

    def norm(self) -> Tensor:
        factors = self.own()
        return first_of(factors).float().norm() * self._second(factors).float().norm() * abs(self.scale)


def first_of(factors: Mapping[str, Tensor]) -> Tensor:
    """C."""
    return factors["lokr_w1"] if "lokr_w1" in factors else factors["lokr_w1_a"] @ factors["lokr_w1_b"]


def is_whole(names: Mapping[str, object]) -> bool:
    return "lokr_w1" in names and "lokr_w2" in names


def divided(size: int, factor: int) -> tuple[int, int]:
    """Two numbers whose product is the size, the smaller first.

    One is `factor` where that divides the size; else the smaller is as large as can be, but no larger than `factor`,
    unless that is -1.
    """
    if factor > 0 and size % factor == 0:
        return min(factor, size // factor), max(factor, size // factor)
    largest = math.isqrt(size) if factor < 0 else min(factor, math.isqrt(size))
    smaller = next(number for number in range(largest, 0, -1) if size % number == 0)
    return smaller, size // smaller


def new_shapes(
    layer: nn.Module,
    rank: int,
    factor: int = -1,
    decompose_both: bool = False,
    full_matrix: bool = False,
    use_tucker: bool = False,
) -> Shapes:
    """Matrices are of low rank where that is less than half of their longer side; the first only if both are to be."""
    outputs, inputs, kernel = sizes_of(layer)
    (a, b), (c, d) = divided(outputs, factor), divided(inputs, factor)
    shapes: dict[str, tuple[int, ...]] = {}
    if decompose_both and not full_matrix and rank < max(a, c) / 2:
        shapes |= {"lokr_w1_a": (a, rank), "lokr_w1_b": (rank, c)}
    else:
        shapes["lokr_w1"] = (a, c)
    if full_matrix or rank >= max(b, d) / 2:
        shapes["lokr_w2"] = (b, d, *kernel)
    elif use_tucker and prod(kernel) > 1:
        shapes |= {"lokr_w2_a": (rank, b), "lokr_w2_b": (rank, d), "lokr_t2": (rank, rank, *kernel)}
    else:
        shapes |= {"lokr_w2_a": (b, rank), "lokr_w2_b": (rank, d * prod(kernel))}
    return shapes


def changes(shapes: Shapes) -> tuple[int, int]:
    """Outputs, and inputs times the kernel, of the weight that factors of these sizes change."""
    a, c = shapes["lokr_w1"] if "lokr_w1" in shapes else (shapes["lokr_w1_a"][0], shapes["lokr_w1_b"][1])
    if "lokr_w2" in shapes:
        b, d = shapes["lokr_w2"][0], prod(shapes["lokr_w2"][1:])
    elif "lokr_t2" in shapes:
        b, d = shapes["lokr_w2_a"][1], shapes["lokr_w2_b"][1] * prod(shapes["lokr_t2"][2:])
    else:
        b, d = shapes["lokr_w2_a"][0], prod(shapes["lokr_w2_b"][1:])
    return a * b, c * d


def rank_of(weights: Mapping[str, Tensor]) -> int | None:
    """The rank of a layer of a file; 1 where its matrices are whole."""
    has_both = all(f"lokr_w{n}" in weights or {f"lokr_w{n}_a", f"lokr_w{n}_b"} <= weights.keys() for n in "12")
    if not has_both:
        return None
    return next((len(weights[name]) for name in ("lokr_w2_b", "lokr_w1_b") if name in weights), 1)


def create_network(
    targets: list[AdapterTarget],
    network_dim: int | None,
    network_alpha: int | float | None,
    neuron_dropout: float | None = None,
    **network_args: str,
) -> AdapterNetwork:
    """A LoKr network on the targets; of `network_args` those of ranks, blocks and dropouts are as LoRA's."""
    given = read(network_args)
    dropouts = dropouts_of(given, neuron_dropout)
    structure = {name: given[name] for name in ("factor", *STRUCTURE) if name in given}

    def make(target: AdapterTarget, rank: int, alpha: int | float) -> LokrAdapter:
        return LokrAdapter(target, new_shapes(target.layer, rank, **structure), rank, alpha, **dropouts)

    return network_of_ranks(AdapterNetwork, targets, network_dim, network_alpha, given, make)


def create_network_from_weights(
    targets: list[AdapterTarget], path: Path, neuron_dropout: float | None = None, **network_args: str
) -> AdapterNetwork:
    """The network of a file, also of LyCORIS; of `network_args` what is not about ranks still counts."""
    given = read(network_args)
    dropouts = dropouts_of(given, neuron_dropout)

    def make(target: AdapterTarget, weights: Mapping[str, Tensor]) -> LokrAdapter:
        shapes = shapes_of(NAMES, weights, changes, target.layer)
        return LokrAdapter(target, shapes, rank_of(weights), weights["alpha"].flatten()[0].item(), **dropouts)

    return network_of_file(AdapterNetwork, targets, path, given, rank_of, make, FILE_KNOWS)
