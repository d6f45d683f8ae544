"""LoRA (arXiv:2106.09685) for Linear layers and convolutions, and LoCon: LoRA on 3x3 convolutions too (`conv_dim`).

The change of a weight W [out, in] is (alpha / rank) B A, with A [rank, in] random and B [out, rank] zero at the start.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.errors import UserError
from library.families.base import AdapterTarget
from library.layers.flat import GradientSink
from networks.base import Adapter, AdapterNetwork
from networks.building import dropouts_of, network_of_file, network_of_ranks
from networks.decomposed import Decomposed, DecomposedNetwork, is_of_outputs
from networks.lora_arguments import OF_FILE, read
from networks.lora_arguments import check_arguments as check_arguments
from networks.lora_arguments import needs_base_weights as needs_base_weights
from networks.lora_arguments import wants_convolutions as wants_convolutions
from networks.lora_arguments import wants_norms as wants_norms
from networks.lora_function import LoraFunction, hidden_of
from networks.lora_norms import norms_of
from networks.shared_input import SharedInput, share_input

logger = logging.getLogger(__name__)

OVERSAMPLING, POWER_ITERATIONS = 8, 16  # of PiSSA's beginning


class LoraNetwork(DecomposedNetwork):
    """LoRA on all targets; where weights are in one buffer, layers that read the same tensor compute together."""

    def norms(self) -> Tensor:
        adapters = self.adapters()
        are_products = all(type(adapter).norm is LoraAdapter.norm for adapter in adapters)
        return norms_of(adapters) if are_products else super().norms()

    def rescale(self, ratios: Tensor) -> None:
        adapters = self.adapters()
        if any(type(adapter).rescale is not LoraAdapter.rescale for adapter in adapters):
            super().rescale(ratios)
            return
        matrices = [matrix for adapter in adapters for matrix in (adapter.lora_down.weight, adapter.lora_up.weight)]
        torch._foreach_mul_(matrices, [root for root in ratios.sqrt().unbind() for _ in "AB"])

    def flatten(self, groups: Sequence[dict], dtype: torch.dtype) -> None:
        super().flatten(groups, dtype)
        beside: dict[tuple, list[LoraAdapter]] = {}
        for adapter in self.adapters():
            if adapter.input:
                beside.setdefault((adapter.part, adapter.input), []).append(adapter)
        for adapters in beside.values():
            share_input(adapters)


class LoraAdapter(Adapter):
    """B A of one layer, named lora_up and lora_down in files."""

    function: type[torch.autograd.Function] = LoraFunction

    def __init__(
        self,
        target: AdapterTarget,
        rank: int,
        alpha: int | float,
        dropout: float | None = None,
        rank_dropout: float | None = None,
        module_dropout: float | None = None,
        train_bias: bool = False,
    ):
        super().__init__(target, module_dropout)
        self.rank, self.dropout, self.rank_dropout = rank, dropout, rank_dropout
        layer = target.layer
        if isinstance(layer, nn.Linear):
            self.lora_down = nn.Linear(layer.in_features, rank, bias=False)
            self.lora_up = nn.Linear(rank, layer.out_features, bias=False)
        else:
            geometry = (layer.kernel_size, layer.stride, layer.padding)
            self.lora_down = nn.Conv2d(layer.in_channels, rank, *geometry, bias=False)
            self.lora_up = nn.Conv2d(rank, layer.out_channels, 1, bias=False)
        self.initialise()
        has_bias = train_bias and layer.bias is not None
        self.diff_b = nn.Parameter(torch.zeros(layer.bias.shape)) if has_bias else None
        self.register_buffer("alpha", torch.tensor(alpha))  # an integer stays one in the file
        self.scale = alpha / rank
        self.flat: tuple[Tensor, Tensor, GradientSink] | None = None  # A, B and their gradients in shared buffers
        self.shared: SharedInput | None = None  # with the layers beside this one that read the same

    def initialise(self) -> None:
        """A as kohya draws it, B zero."""
        nn.init.kaiming_uniform_(self.lora_down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_up.weight)

    def refresh(self) -> None:
        """Follow an alpha that was loaded from a file."""
        self.scale = self.alpha.item() / self.rank

    def forward(self, x: Tensor) -> Tensor:
        if self.is_stacked or torch.is_autocast_enabled(x.device.type) or torch.compiler.is_compiling():
            return super().forward(x)  # a compiler makes one function of the layer by itself
        if self.multiplier == 0 or self._is_dropped():
            return self.base_output(x)
        if self.shared and self.training:
            return self.shared.output(self, x)
        down, up, sink = self.flat if self.flat and self.training else (*self.learning_matrices(), None)
        mask_of = self._mask if self.training and (self.dropout or self.rank_dropout) else None
        scale = self.scale * self.multiplier
        down, up = down.to(x.dtype), up.to(x.dtype)
        output = self.function.apply(x, self.anchor(), down, up, self.base, scale, mask_of, sink)
        return output if self.diff_b is None else output + self.multiplier * self._bias(output)

    def anchor(self) -> Tensor:
        """A parameter that has gradients, by which autograd comes by."""
        return self.lora_up.weight

    def matrices(self) -> tuple[Tensor, Tensor]:
        """A and B."""
        return self.lora_down.weight, self.lora_up.weight

    def learning_matrices(self) -> tuple[Tensor, Tensor]:
        """A and B of one forward pass, which may leave some of their ranks without gradients."""
        return self.matrices()

    def delta(self, x: Tensor) -> Tensor:
        down, up = self.learning_matrices()
        if not torch.is_autocast_enabled(x.device.type):
            down, up = down.to(x.dtype), up.to(x.dtype)
        hidden = hidden_of(x, down, self.base)
        if self.training and (self.dropout or self.rank_dropout):
            hidden = hidden * self._mask(hidden)
        change = (F.linear(hidden, up) if up.ndim == 2 else F.conv2d(hidden, up)) * self.scale
        return change if self.diff_b is None else change + self._bias(change)

    def _bias(self, output: Tensor) -> Tensor:
        """The change of the bias, as it is added to outputs."""
        bias = self.diff_b.to(output.dtype)
        return bias if isinstance(self.base, nn.Linear) else bias[:, None, None]

    def _mask(self, hidden: Tensor) -> Tensor:
        """What dropout multiplies A x with: survivors are scaled by 1 / (1 - p), ranks fall out for whole samples."""
        mask = hidden.new_ones(hidden.shape)
        if self.dropout:
            mask = F.dropout(mask, self.dropout)
        if self.rank_dropout:
            mask = mask * self._rank_mask(hidden)
        return mask

    def _rank_mask(self, hidden: Tensor) -> Tensor:
        """One decision per sample and rank."""
        kept = torch.rand(hidden.shape[0], self.rank, device=hidden.device) > self.rank_dropout  # [B, rank]
        if hidden.ndim == 4:
            kept = kept[:, :, None, None]
        elif hidden.ndim == 3:
            kept = kept[:, None, :]
        return kept.to(hidden.dtype) / (1 - self.rank_dropout)

    def flat_parameters(self) -> list[nn.Parameter]:
        if self.module_dropout or self.diff_b is not None:
            return []
        return [self.lora_down.weight, self.lora_up.weight]

    def use_flat(self, values: list[Tensor], gradients: list[Tensor]) -> GradientSink:
        sink = GradientSink(*gradients)
        self.flat = *values, sink
        return sink

    def delta_weight(self) -> Tensor:
        down, up = self.matrices()
        product = up.flatten(1) @ down.flatten(1)
        return (product * self.scale).view(self.base.weight.shape)

    def norm(self) -> Tensor:
        return norms_of([self])[0]

    def rescale(self, factor: Tensor) -> None:
        """Half of the factor, as kohya does, on A and half on B."""
        for matrix in (self.lora_down.weight, self.lora_up.weight):
            matrix.mul_(factor**0.5)

    @torch.no_grad()
    def merge(self, multiplier: float = 1.0) -> None:
        super().merge(multiplier)
        if self.diff_b is not None:
            self.base.bias.add_(multiplier * self.diff_b.to(self.base.bias))

    def plus_parameters(self) -> list[nn.Parameter]:
        return [self.lora_up.weight]


class DoraAdapter(Decomposed, LoraAdapter):
    """DoRA of one layer, with dora_scale beside them."""


class OrthogonalAdapter(LoraAdapter):
    """The rows of A are at right angles to each other, and as long as kohya's are in the mean."""

    def initialise(self) -> None:
        nn.init.orthogonal_(self.lora_down.weight, gain=1 / math.sqrt(3))
        nn.init.zeros_(self.lora_up.weight)


class PissaAdapter(LoraAdapter):
    """PiSSA (arXiv:2404.02948): A and B begin as the weight's own largest singular vectors, and so learn those first.

    The base stays whole: what is added is B A less its beginning B0 A0, as (B - B0) A + B0 (A - A0), which is exactly 0
    at the start. In files this is a plain LoRA of twice the rank.
    """

    def __init__(self, target: AdapterTarget, rank: int, alpha: int | float, *others: Any, **dropouts: Any):
        super().__init__(target, rank, alpha, *others, **dropouts)
        smallest = min(self.base.weight.flatten(1).shape)
        if rank > smallest:
            raise UserError(f"--network_args: init=pissa: rank {rank} is more than the {smallest} that {self.name} has")
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


class PissaNetwork(AdapterNetwork):
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


INITIALISATIONS = {"kaiming": LoraAdapter, "orthogonal": OrthogonalAdapter, "pissa": PissaAdapter}


def create_network(
    targets: list[AdapterTarget],
    network_dim: int | None,
    network_alpha: int | float | None,
    neuron_dropout: float | None = None,
    **network_args: str,
) -> AdapterNetwork:
    """A LoRA network on the targets; `network_args` are kohya's and our own, as strings."""
    given = read(network_args)
    dropouts = dropouts_of(given, neuron_dropout)
    begins = given.get("init", "kaiming")
    make = partial(INITIALISATIONS[begins], train_bias=given.get("train_bias", False), **dropouts)
    if given.get("dora"):
        make = partial(DoraAdapter, on_output=given.get("wd_on_output", False), **dropouts)
    warn_of_consumers(given)
    kind = PissaNetwork if begins == "pissa" else LoraNetwork
    return network_of_ranks(kind, targets, network_dim, network_alpha, given, make)


def create_network_from_weights(
    targets: list[AdapterTarget], path: Path, neuron_dropout: float | None = None, **network_args: str
) -> AdapterNetwork:
    """The network of a file, LoRA or DoRA by layer; of `network_args` what the file does not know still counts."""
    given = read(network_args)
    dropouts = dropouts_of(given, neuron_dropout)

    def make(target: AdapterTarget, weights: Mapping[str, Tensor]) -> LoraAdapter:
        if "dora_scale" in weights:
            is_on_output = is_of_outputs(weights["dora_scale"])
            return of_weights(partial(DoraAdapter, on_output=is_on_output, **dropouts), target, weights)
        return of_weights(partial(LoraAdapter, **dropouts), target, weights)

    return network_of_file(LoraNetwork, targets, path, given, rank_of, make, OF_FILE)


def of_weights(make: Callable[..., LoraAdapter], target: AdapterTarget, weights: Mapping[str, Tensor]) -> LoraAdapter:
    """An adapter with the rank, the alpha and the bias that a layer of a file has."""
    bias = {"train_bias": True} if "diff_b" in weights else {}
    return make(target, rank_of(weights), weights["alpha"].flatten()[0].item(), **bias)


def rank_of(weights: Mapping[str, Tensor]) -> int | None:
    """The rank of a layer of a file."""
    down = weights.get("lora_down.weight")
    return len(down) if down is not None and down.ndim and len(down) else None


def warn_of_consumers(given: dict[str, Any]) -> None:
    """Lines about what other programs do not read."""
    for argument, keys in {"train_norm": "w_norm and b_norm", "train_bias": "diff_b"}.items():
        if given.get(argument):
            logger.warning(
                "--network_args: %s: diffusers refuses files with %s; ComfyUI and the WebUI take them", argument, keys
            )
