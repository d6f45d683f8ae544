"""The gradients of a step: of each parameter for itself, or of all parameters in one buffer."""

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from library.layers.flat import FlatWeights


class Gradients(Protocol):
    """What the loop does with gradients."""

    def begin(self) -> None: ...  # before the first forward pass of a step

    def collect(self) -> None: ...  # after each backward pass

    def average(self, accelerator: Accelerator) -> None: ...  # over processes

    def clip(self, accelerator: Accelerator, max_norm: float) -> Tensor: ...  # 0 is no limit; the norm, unclipped

    def clear(self) -> None: ...  # after the optimizer's step


class SeparateGradients:
    """Each parameter's own, as autograd makes them."""

    def __init__(self, parameters: Sequence[nn.Parameter]):
        self.parameters = list(parameters)

    def begin(self) -> None:
        pass

    def collect(self) -> None:
        pass

    def average(self, accelerator: Accelerator) -> None:
        """The mean, in one message, which also says who has gradients.

        Where a process has none (a dropped layer), its part is 0; where no process has one there is none, as with one
        process: optimizers leave such parameters alone.
        """
        parameters = self.parameters
        is_here = [parameter.grad is not None for parameter in parameters]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flags = torch.tensor(is_here).to(gradients[0], non_blocking=True)
        mean = accelerator.reduce(torch.cat([*(gradient.flatten() for gradient in gradients), flags]), reduction="mean")
        *parts, flags = mean.split([*(p.numel() for p in parameters), len(parameters)])
        is_anywhere = is_here if all(is_here) else flags.tolist()  # only then the device is waited for
        for parameter, part, is_there in zip(parameters, parts, is_anywhere, strict=True):
            parameter.grad = part.view_as(parameter) if is_there else None

    def clip(self, accelerator: Accelerator, max_norm: float) -> Tensor:
        return accelerator.clip_grad_norm_(self.parameters, max_norm or math.inf)

    def clear(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None


class FlatGradients:
    """Those of `FlatWeights`. Parameters that a backward pass has reached show theirs as `grad`, a view."""

    def __init__(self, weights: FlatWeights):
        self.weights = weights
        self.num_shown = 0  # layers
        if moved := [span for span in weights.spans if span.parameter.data_ptr() != span.of(weights.values).data_ptr()]:
            raise RuntimeError(f"{len(moved)} parameters were given other memory after they had been put into one")

    def begin(self) -> None:
        self.weights.refresh()

    def collect(self) -> None:
        self.weights.collect()
        if self.num_shown < len(self.weights.first_uses):
            for span in self.weights.used():
                span.parameter.grad = span.of(self.weights.gradients)
            self.num_shown = len(self.weights.first_uses)

    def average(self, accelerator: Accelerator) -> None:
        """The mean; what is reached is the same in all processes."""
        torch.distributed.all_reduce(self.weights.gradients)
        self.weights.gradients.div_(accelerator.num_processes)

    def clip(self, accelerator: Accelerator, max_norm: float) -> Tensor:
        gradients = self.weights.gradients
        if accelerator.scaler is not None:
            accelerator.unscale_gradients()
        norm = torch.linalg.vector_norm(gradients, dtype=torch.float32)
        if max_norm:
            gradients.mul_(clip_factor(norm, max_norm))
        return norm

    def clear(self) -> None:
        self.weights.gradients.zero_()


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """What gradients of this norm are multiplied with, at most 1; as PyTorch computes it."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def gradients_of(optimizer: Optimizer, network: nn.Module) -> Gradients:
    """Those of the parameters that the optimizer trains."""
    if flat := flat_of(network):
        return FlatGradients(flat)
    return SeparateGradients([parameter for group in optimizer.param_groups for parameter in group["params"]])


def flat_of(network: nn.Module) -> FlatWeights | None:
    """The buffers of a network; those of other projects have none."""
    return getattr(network, "flat", None)
