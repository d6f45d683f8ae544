"""A frozen model that is stored in 8 bits a weight (--fp8_base) and computes in the format it had."""

import math

import torch
from torch import Tensor, nn

from library.layers import converted
from library.layers.converted import Converted

STORED_DTYPE = torch.float8_e4m3fn  # arXiv:2209.05433: 4 significant bits, 2^-9 to 448
SMALLEST_PEAK = 2.0**-20  # layers of smaller weights, such as zeros, are scaled no further
# Formats with exponents of 8 bits around 127: where an e4m3 number's bits go, and which they are there
PLACES = {
    torch.float32: (torch.int32, 20, -(2**31) | 0x7F << 20),
    torch.bfloat16: (torch.int16, 4, -(2**15) | 0x7F << 4),
}
LARGER = 2.0**120  # since e4m3's exponents are around 7
LARGEST_SCALE = 64.0  # times which that is still a number in fp32


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
    if not math.isfinite(peak):
        return math.nan  # such a model is no better in 8 bits
    return 2.0 ** (1 - math.frexp(torch.finfo(STORED_DTYPE).max / peak)[1])


class StoredInFp8(Converted):
    """How both kinds of layers are stored."""

    stored: Tensor
    scale: float

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        if self.stored.device.type == "cpu" and dtype in PLACES and self.scale <= LARGEST_SCALE:
            return moved_bits(self.stored, dtype).mul_(LARGER * self.scale)
        return self.stored.to(dtype).mul_(self.scale)


def moved_bits(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers over `LARGER`: PyTorch converts fp8 on a processor one at a time, but shifts many."""
    integers, places, mask = PLACES[dtype]
    return stored.view(torch.int8).to(integers).bitwise_left_shift_(places).bitwise_and_(mask).view(dtype)


class Linear(StoredInFp8, converted.Linear):
    pass


class Conv2d(StoredInFp8, converted.Conv2d):
    pass


FP8_LAYERS = {nn.Linear: Linear, nn.Conv2d: Conv2d}
