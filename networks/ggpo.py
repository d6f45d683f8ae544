"""LoRA-GGPO (arXiv:2502.14538): while a network is trained, weights W' = W + s B A are disturbed at random.

    E[i, j] ~ N(0, sigma^2 / n (|W'[i]|^2 + beta |dL/dW'[i]|^2)), n numbers in each row W'[i]

is added to each pass anew, so that training looks for flat minima. |W'[i]|^2 is taken as |W[i]|^2 + |s B A[i]|^2, and
the gradient as s (B dA + dB A), that of the step before: both cost products as small as the rank, and W is read once.
The backward pass draws E again from its seed; it is not kept. A layer is disturbed from its first gradient on.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.layers.frozen import conv2d_input_gradient, product_of
from networks.lora_function import geometry

AT_ONCE = 16  # layers whose norms are computed in the same few operations; copies of their matrices take memory


class Perturbation:
    """That of one layer."""

    def __init__(self):
        self.spread: Tensor | None = None  # the standard deviation of each row, [out]

    def added_to(self, output: Tensor, x: Tensor, layer: nn.Module) -> Tensor:
        """The output [..., out] or [N, out, h, w] of a layer for x, with E x added.

        Seeds come from the CPU's own generator, as those of dropout do.
        """
        if self.spread is None:
            return output
        return Perturbed.apply(output, x, self.spread, layer, torch.randint(2**62, ()).item())


class Perturbed(torch.autograd.Function):
    """`apply(output, x, spread, layer, seed)`; only the spread is kept."""

    @staticmethod
    def forward(ctx, output: Tensor, x: Tensor, spread: Tensor, layer: nn.Module, seed: int) -> Tensor:
        ctx.layer, ctx.seed, ctx.shape, ctx.dtype = layer, seed, x.shape, x.dtype
        ctx.save_for_backward(spread)
        change, x = drawn(layer, spread, seed, output.dtype), x.to(output.dtype)
        if change.ndim == 2:
            return product_of(layer)(x, change).add_(output)
        return F.conv2d(x, change, None, *geometry(layer)).add_(output)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (spread,) = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            return gradient, None, None, None, None
        change = drawn(ctx.layer, spread, ctx.seed, gradient.dtype)
        if change.ndim == 2:
            to_input = gradient @ change
        else:
            to_input = conv2d_input_gradient(ctx.layer, change, gradient, ctx.shape)
        return gradient, to_input.to(ctx.dtype), None, None, None


def drawn(layer: nn.Module, spread: Tensor, seed: int, dtype: torch.dtype) -> Tensor:
    """E of this seed, in the shape of the layer's weight."""
    generator = torch.Generator(spread.device).manual_seed(seed)
    if isinstance(layer, nn.Linear):
        shape = layer.out_features, layer.in_features
    else:
        shape = layer.out_channels, layer.in_channels, *layer.kernel_size
    normal = torch.randn(shape, generator=generator, device=spread.device, dtype=dtype)
    return normal.mul_(spread.to(dtype).view(-1, *[1] * (len(shape) - 1)))


class Lora(Protocol):
    """What is asked here of a LoRA adapter."""

    name: str
    base: nn.Module
    scale: float
    lora_down: nn.Module
    lora_up: nn.Module
    perturbation: Perturbation | None

    def matrices(self) -> tuple[Tensor, Tensor]: ...  # A and B of the change


class Perturbations:
    """Those of a network's layers, whose spreads follow each optimizer step."""

    def __init__(self, adapters: Sequence[Lora], sigma: float, beta: float):
        self.adapters, self.sigma, self.beta = list(adapters), sigma, beta
        self.base_squares: dict[str, Tensor] = {}  # |W[i]|^2, [out] in fp32, by the names of layers
        for adapter in self.adapters:
            adapter.perturbation = Perturbation()

    @torch.no_grad()
    def begin(self) -> None:
        """Take the norms of the base model, whose weights are there by now where adapters are trained."""
        for adapter in self.adapters:
            if not adapter.lora_up.weight.requires_grad:
                continue
            rows = adapter.base.weight.flatten(1)
            squares = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32).square()
            self.base_squares[adapter.name] = squares.to(adapter.lora_up.weight.device)

    @torch.no_grad()
    def update(self, taken: Tensor | bool) -> None:
        """Follow weights and gradients; layers without gradients, as dropout leaves them out, stay as they are."""
        if taken is False:
            return
        groups: dict[tuple, list[Lora]] = {}
        for adapter in self.adapters:
            down, up = adapter.lora_down.weight, adapter.lora_up.weight
            if down.grad is not None and up.grad is not None:
                groups.setdefault((down.shape, up.shape, adapter.scale), []).append(adapter)
        for group in chain.from_iterable(map(parts_of, groups.values())):
            spreads = self._spreads(group)
            if taken is not True:
                before = [adapter.perturbation.spread for adapter in group]
                before = [torch.zeros_like(spreads[0]) if spread is None else spread for spread in before]
                spreads = torch.where(taken, spreads, torch.stack(before))
            for adapter, spread in zip(group, spreads.unbind(), strict=True):
                adapter.perturbation.spread = spread

    def _spreads(self, adapters: Sequence[Lora]) -> Tensor:
        """[adapters, out] of layers of one shape, rank and scale."""
        changed_down, changed_up = (stacked(of) for of in zip(*(a.matrices() for a in adapters), strict=True))
        pairs = [(adapter.lora_down.weight, adapter.lora_up.weight) for adapter in adapters]
        down, up = (stacked(of) for of in zip(*pairs, strict=True))
        to_down, to_up = (stacked([parameter.grad for parameter in of]) for of in zip(*pairs, strict=True))
        of_weight = row_squares(torch.cat([up, to_up], 2), torch.cat([to_down, down], 1))
        squares = torch.stack([self.base_squares[adapter.name] for adapter in adapters])
        squares += adapters[0].scale ** 2 * (row_squares(changed_up, changed_down) + self.beta * of_weight)
        return (squares.clamp(min=0) / down.shape[2]).sqrt() * self.sigma

    def state_dict(self) -> dict[str, Any]:
        spreads = {adapter.name: adapter.perturbation.spread for adapter in self.adapters}
        return {"spreads": {name: spread for name, spread in spreads.items() if spread is not None}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for adapter in self.adapters:
            spread = state["spreads"].get(adapter.name)
            adapter.perturbation.spread = None if spread is None else spread.to(adapter.lora_up.weight.device)


def parts_of(adapters: Sequence[Lora]) -> list[Sequence[Lora]]:
    return [adapters[first : first + AT_ONCE] for first in range(0, len(adapters), AT_ONCE)]


def stacked(matrices: Sequence[Tensor]) -> Tensor:
    """Matrices of one shape as [count, rows, columns] in fp32."""
    return torch.stack(tuple(matrices)).flatten(2).float()


def row_squares(left: Tensor, right: Tensor) -> Tensor:
    """The squares of the norms of the rows of `left @ right`, which is not made, [count, rows]."""
    return (left @ (right @ right.mT) * left).sum(2)
