"""LoRA of one layer, and the network of such layers."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.families.base import AdapterTarget
from library.layers.flat import GradientSink
from networks.base import Adapter
from networks.decomposed import DecomposedNetwork
from networks.ggpo import Perturbation, Perturbations
from networks.hooks import Kept
from networks.lora_function import LoraFunction, hidden_of
from networks.lora_norms import norms_of
from networks.shared_input import SharedInput, share_input


class LoraNetwork(DecomposedNetwork):
    """LoRA on all targets; where weights are in one buffer, layers that read the same tensor compute together."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.perturbations: Perturbations | None = None

    def perturb(self, sigma: float, beta: float) -> None:
        """Train at weights that are disturbed at random (LoRA-GGPO)."""
        adapters = [adapter for adapter in self.adapters() if isinstance(adapter, LoraAdapter)]
        self.perturbations = Perturbations(adapters, sigma, beta)

    def training_begins(self, num_steps: int, step: int) -> None:
        super().training_begins(num_steps, step)
        if self.perturbations:
            self.perturbations.begin()

    def weights_updated(self, taken: Tensor | bool) -> None:
        super().weights_updated(taken)
        if self.perturbations:
            self.perturbations.update(taken)

    def kept(self) -> dict[str, Kept]:
        return {"the perturbations of weights (ggpo_sigma)": self.perturbations} if self.perturbations else {}

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
        self.perturbation: Perturbation | None = None  # of the weight, while training

    def initialise(self) -> None:
        """A as kohya draws it, B zero."""
        nn.init.kaiming_uniform_(self.lora_down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_up.weight)

    def refresh(self) -> None:
        """Follow an alpha that was loaded from a file."""
        self.scale = self.alpha.item() / self.rank

    def forward(self, x: Tensor) -> Tensor:
        output = self.changed_output(x)
        if self.perturbation and self.training and self.multiplier:
            return self.perturbation.added_to(output, x, self.base)
        return output

    def changed_output(self, x: Tensor) -> Tensor:
        """What the layer gives with this adapter."""
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
