"""A frozen model that is stored in 8 bits a weight (--fp8_base) and computes in the format it had."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.layers.frozen import FrozenLayer, conv2d_input_gradient

STORED_DTYPE = torch.float8_e4m3fn  # arXiv:2209.05433: 4 significant bits, 2^-9 to 448
SMALLEST_PEAK = 2.0**-20  # layers of smaller weights, such as zeros, are scaled no further


def hold_in_fp8(model: nn.Module) -> None:
    """Store the weights of a frozen model's Linear layers and 2D convolutions in fp8, the rest as it is.

    A weight is converted where it is used, and only while it is. Call this before adapters are attached, and after
    everything that is merged into the weights.
    """
    for layer in model.modules():
        if type(layer) in FP8_LAYERS:
            weight = layer.weight.detach()
            del layer.weight
            layer.compute_dtype, layer.scale = weight.dtype, scale_of(weight)
            layer.stored = nn.Parameter((weight / layer.scale).to(STORED_DTYPE), requires_grad=False)
            layer.__class__ = FP8_LAYERS[type(layer)]


def scale_of(weight: Tensor) -> float:
    """The power of two by which a weight is divided to fill the range of fp8; multiplying by it again is exact.

    Without it weights around 0.01, as wide layers have, would keep 3 significant bits or fewer.
    """
    if weight.is_meta:  # it has no values
        return 1.0
    peak = max(weight.abs().max().item(), SMALLEST_PEAK)
    return 2.0 ** (1 - math.frexp(torch.finfo(STORED_DTYPE).max / peak)[1])


class StoredInFp8(FrozenLayer):
    """What the layers below share: `weight` is what they compute with, made anew at each use.

    They are called as the layers that they stand for, since networks may look for these names.
    """

    stored: Tensor
    scale: float
    compute_dtype: torch.dtype

    @property
    def weight(self) -> Tensor:
        return converted(self.stored, self.compute_dtype, self.scale)


class Linear(StoredInFp8, nn.Linear):
    def output(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def input_gradient(self, gradient: Tensor, shape: torch.Size) -> Tensor:
        return gradient @ converted(self.stored, gradient.dtype, self.scale)


class Conv2d(StoredInFp8, nn.Conv2d):
    def output(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight, self.bias)

    def input_gradient(self, gradient: Tensor, shape: torch.Size) -> Tensor:
        weight = converted(self.stored, gradient.dtype, self.scale)
        return conv2d_input_gradient(self, weight, gradient, shape)


FP8_LAYERS = {nn.Linear: Linear, nn.Conv2d: Conv2d}


def converted(stored: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    return stored.to(dtype).mul_(scale)
