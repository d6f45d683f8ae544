"""LoHa (arXiv:2108.06098, called FedPara there): a change that is the product, entry by entry, of two of low rank.

The change of a weight W [out, in] is (alpha / rank) (A1 B1) * (A2 B2), with A2 zero at the start; its rank is up to the
square of theirs. Names and first values are those of LyCORIS (arXiv:2309.14859): hada_w1_a for A1 and so on, and with
`use_tucker` a core of the kernel's size between the matrices of a convolution, hada_t1 and hada_t2.
"""

from collections.abc import Mapping
from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

from library.families.base import AdapterTarget
from networks.base import AdapterNetwork
from networks.building import dropouts_of, network_of_file, network_of_ranks
from networks.factored import FactoredAdapter, Shapes, shapes_of, sizes_of, with_core
from networks.loha_arguments import FILE_KNOWS, read
from networks.loha_arguments import check_arguments as check_arguments
from networks.loha_arguments import wants_convolutions as wants_convolutions
from networks.lora_function import LoraFunction
from networks.weight_function import WeightFunction

NAMES = "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"


class LohaAdapter(FactoredAdapter):
    """The change of one layer: A [out, rank] and B [rank, in ...], or beside a core A [rank, out] and B [rank, in]."""

    def __init__(self, target: AdapterTarget, shapes: Shapes, rank: int, alpha: int | float, **dropouts: float | None):
        super().__init__(target, shapes, rank, alpha, **dropouts)
        for name, parameter in self.own().items():
            nn.init.normal_(parameter, std=1.0 if name.endswith("_b") else 0.1)
        nn.init.zeros_(self.hada_w2_a)

    def product(self, factors: Mapping[str, Tensor]) -> Tensor:
        return product(self.shape, *factors.values())

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the layer's weight."""
        outputs, inputs, kernel = sizes_of(self.base)
        return outputs, inputs, *kernel

    def changed_output(self, x: Tensor, factors: Mapping[str, Tensor], scale: float) -> Tensor:
        values = list(factors.values())
        if len(values) == 4 and self._is_best_as_lora(x):
            down, up = as_lora(self.shape, *values)
            return LoraFunction.apply(x, up, down, up, self.base, scale, None, None)
        return WeightFunction.apply(x, self.base, scale, partial(product, self.shape), *values)

    def _is_best_as_lora(self, x: Tensor) -> bool:
        """Whether a LoRA of rank rank^2, which is the same, takes fewer multiplications than a change of the weight.

        Of a row of x a LoRA takes 4 by each input and 3 by each output for each rank; the weight's gradient takes one
        by each of its entries, and to make it and its parts' gradients takes 8 by rank and entry, whatever the rows.
        In 16 bits the change has two products of its own besides.
        """
        rows, inputs = x.numel() // x.shape[1 if x.ndim == 4 else -1], prod(self.shape[1:])
        products = 1 if x.dtype == torch.float32 else 3
        of_lora = rows * self.rank**2 * (4 * inputs + 3 * self.shape[0])
        return of_lora < (products * rows + 8 * self.rank) * inputs * self.shape[0]


def product(shape: tuple[int, ...], *factors: Tensor) -> Tensor:
    """(A1 B1) * (A2 B2) in a weight's shape; each with a core between them where there are cores."""
    a1, b1, a2, b2, *cores = factors
    if not cores:
        return ((a1 @ b1) * (a2 @ b2)).view(shape)
    return with_core(cores[0], a1, b1) * with_core(cores[1], a2, b2)


def as_lora(shape: tuple[int, ...], a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> tuple[Tensor, Tensor]:
    """The matrices [rank^2, in] and [out, rank^2] of the LoRA that is the same: all products of two ranks."""
    down = (b1[:, None] * b2[None]).view(-1, *shape[1:])
    up = (a1[:, :, None] * a2[:, None, :]).flatten(1)
    return down, up.view(*up.shape, *[1] * (len(shape) - 2))


def new_shapes(layer: nn.Module, rank: int, use_tucker: bool) -> Shapes:
    outputs, inputs, kernel = sizes_of(layer)
    size = prod(kernel)
    if use_tucker and size > 1:
        matrices, cores = [(rank, outputs), (rank, inputs)] * 2, [(rank, rank, *kernel)] * 2
    else:
        matrices, cores = [(outputs, rank), (rank, inputs * size)] * 2, []
    return dict(zip(NAMES, [*matrices, *cores], strict=False))


def changes(shapes: Shapes) -> tuple[int, int]:
    """Outputs, and inputs times the kernel, of the weight that factors of these sizes change."""
    a, b = shapes["hada_w1_a"], shapes["hada_w1_b"]
    return (a[1], b[1] * prod(shapes["hada_t1"][2:])) if "hada_t1" in shapes else (a[0], prod(b[1:]))


def rank_of(weights: Mapping[str, Tensor]) -> int | None:
    """The rank of a layer of a file."""
    return len(weights["hada_w1_b"]) if set(NAMES[:4]) <= weights.keys() else None


def create_network(
    targets: list[AdapterTarget],
    network_dim: int | None,
    network_alpha: int | float | None,
    neuron_dropout: float | None = None,
    **network_args: str,
) -> AdapterNetwork:
    """A LoHa network on the targets; of `network_args` those of ranks, blocks and dropouts are as LoRA's."""
    given = read(network_args)
    dropouts = dropouts_of(given, neuron_dropout)

    def make(target: AdapterTarget, rank: int, alpha: int | float) -> LohaAdapter:
        shapes = new_shapes(target.layer, rank, given.get("use_tucker", False))
        return LohaAdapter(target, shapes, rank, alpha, **dropouts)

    return network_of_ranks(AdapterNetwork, targets, network_dim, network_alpha, given, make)


def create_network_from_weights(
    targets: list[AdapterTarget], path: Path, neuron_dropout: float | None = None, **network_args: str
) -> AdapterNetwork:
    """The network of a file, also of LyCORIS; of `network_args` what is not about ranks still counts."""
    given = read(network_args)
    dropouts = dropouts_of(given, neuron_dropout)

    def make(target: AdapterTarget, weights: Mapping[str, Tensor]) -> LohaAdapter:
        shapes = shapes_of(NAMES, weights, changes, target.layer)
        return LohaAdapter(target, shapes, rank_of(weights), weights["alpha"].flatten()[0].item(), **dropouts)

    return network_of_file(AdapterNetwork, targets, path, given, rank_of, make, FILE_KNOWS)
