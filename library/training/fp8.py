"""A frozen model that is stored in 8 bits a weight (--fp8_base) and computes in the format it had."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


class StoredInFp8(nn.Module):
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
    def forward(self, x: Tensor) -> Tensor:
        return LinearOfFp8.apply(x, self.stored, self.bias, self.compute_dtype, self.scale)


class Conv2d(StoredInFp8, nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        return Conv2dOfFp8.apply(x, self.stored, self.bias, self.compute_dtype, self.scale, geometry)


FP8_LAYERS = {nn.Linear: Linear, nn.Conv2d: Conv2d}


def converted(stored: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    return stored.to(dtype).mul_(scale)


class LinearOfFp8(torch.autograd.Function):
    """x W^T + b. Converting W inside keeps autograd from holding the result until the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, stored: Tensor, bias: Tensor | None, dtype: torch.dtype, scale: float) -> Tensor:
        ctx.save_for_backward(stored)
        ctx.scale, ctx.x_dtype = scale, x.dtype
        return F.linear(x, converted(stored, dtype, scale), bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (stored,) = ctx.saved_tensors
        grad_x = grad @ converted(stored, grad.dtype, ctx.scale)
        return grad_x.to(ctx.x_dtype), None, None, None, None


class Conv2dOfFp8(torch.autograd.Function):
    """The same for a convolution; `geometry` is its stride, padding, dilation and groups."""

    @staticmethod
    def forward(
        ctx, x: Tensor, stored: Tensor, bias: Tensor | None, dtype: torch.dtype, scale: float, geometry: tuple
    ) -> Tensor:
        ctx.save_for_backward(stored)
        ctx.scale, ctx.x_dtype, ctx.x_shape, ctx.geometry = scale, x.dtype, x.shape, geometry
        return F.conv2d(x, converted(stored, dtype, scale), bias, *geometry)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (stored,) = ctx.saved_tensors
        weight = converted(stored, grad.dtype, ctx.scale)
        grad_x = nn.grad.conv2d_input(ctx.x_shape, weight, grad, *ctx.geometry)
        return grad_x.to(ctx.x_dtype), None, None, None, None, None
