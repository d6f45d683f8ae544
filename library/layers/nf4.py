"""A frozen model that is stored in 4 bits a weight (--base_quantization nf4) and computes in the format it had.

QLoRA (arXiv:2305.14314, section 3): in blocks of 64, weights are divided by the largest of them and become the nearest
of 16 numbers, the quantiles of a normal distribution (NF4). The blocks' scales are stored in 8 bits themselves (double
quantisation): their differences from the layer's mean, in groups of 256. That makes 4.13 bits a weight.
"""

import logging
from functools import lru_cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.errors import first_line
from library.layers import converted
from library.layers.converted import Converted

logger = logging.getLogger(__name__)

BLOCK, GROUP = 64, 256
LARGEST = 127  # of what scales are stored in
SMALLEST = torch.finfo(torch.float32).tiny  # so that zeros are divided by something
FEWEST_CHANNELS = 16  # layers of fewer, the U-Net's first and last, are small and matter most
# arXiv:2305.14314, appendix E
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
MIDDLES = tuple((low + high) / 2 for low, high in zip(NF4, NF4[1:], strict=False))


def hold_in_nf4(model: nn.Module) -> None:
    """Store the weights of a frozen model's Linear layers and 2D convolutions in NF4, the rest as it is.

    Call this before adapters are attached, and after everything that is merged into the weights.
    """
    for layer in model.modules():
        if type(layer) in NF4_LAYERS and can_be_held(layer):
            weight = layer.weight.detach()
            del layer.weight
            layer.compute_dtype, layer.weight_shape = weight.dtype, weight.shape
            for name, value in packed(weight)._asdict().items():
                setattr(layer, name, nn.Parameter(value, requires_grad=False))
            layer.__class__ = NF4_LAYERS[type(layer)]


def can_be_held(layer: nn.Module) -> bool:
    return min(layer.weight.shape[:2]) >= FEWEST_CHANNELS and layer.weight.numel() % BLOCK == 0


class Packed(NamedTuple):
    """A weight of n blocks in NF4; matrices are what --blocks_to_swap moves."""

    stored: Tensor  # [n, 32] uint8; the first of two numbers in the upper four bits
    scales: Tensor  # [n / 256 rounded up, 256] int8, of the blocks, in steps from their mean
    step: Tensor  # [n / 256 rounded up, 1] fp32
    mean: Tensor  # fp32, a scalar


def packed(weight: Tensor) -> Packed:
    blocks = weight.float().reshape(-1, BLOCK)
    peaks = blocks.abs().amax(1, keepdim=True)
    middles = torch.tensor(MIDDLES, device=weight.device)
    numbers = torch.bucketize(blocks / peaks.clamp(min=SMALLEST), middles, out_int32=True).to(torch.uint8)
    mean = peaks.mean()
    differences = F.pad(peaks.view(-1) - mean, (0, -len(peaks) % GROUP)).view(-1, GROUP)
    step = (differences.abs().amax(1, keepdim=True) / LARGEST).clamp(min=SMALLEST)
    scales = (differences / step).round_().to(torch.int8)
    return Packed(numbers[:, ::2] << 4 | numbers[:, 1::2], scales, step, mean)


class StoredInNf4(Converted):
    """How both kinds of layers are stored: as `Packed` says."""

    stored: Tensor
    scales: Tensor
    step: Tensor
    mean: Tensor
    weight_shape: torch.Size

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        peaks = (self.scales * self.step).add_(self.mean).view(-1)[: len(self.stored)]  # [n] fp32
        unpack = unpacked_by_bitsandbytes if has_kernels(self.stored.device) else unpacked
        return unpack(self.stored, peaks, dtype).view(self.weight_shape)


class Linear(StoredInNf4, converted.Linear):
    pass


class Conv2d(StoredInNf4, converted.Conv2d):
    pass


NF4_LAYERS = {nn.Linear: Linear, nn.Conv2d: Conv2d}


def unpacked(stored: Tensor, peaks: Tensor, dtype: torch.dtype) -> Tensor:
    """The blocks [n, 64] of these numbers and scales, in PyTorch's own operations."""
    numbers = F.embedding(stored.int(), pairs(stored.device, dtype)).view(-1, BLOCK)
    return numbers.mul_(peaks.to(dtype)[:, None])


@lru_cache
def pairs(device: torch.device, dtype: torch.dtype) -> Tensor:
    """The two numbers that each byte stands for, [256, 2]; kept, as to make it anew would wait for the device."""
    numbers = torch.tensor(NF4, dtype=dtype, device=device)
    return torch.cartesian_prod(numbers, numbers)


def unpacked_by_bitsandbytes(stored: Tensor, peaks: Tensor, dtype: torch.dtype) -> Tensor:
    """The same in one kernel."""
    return torch.ops.bitsandbytes.dequantize_4bit(stored.view(-1, 1), peaks, BLOCK, "nf4", (len(stored), BLOCK), dtype)


@lru_cache
def has_kernels(device: torch.device) -> bool:
    """Whether bitsandbytes unpacks on this device as we do."""
    if device.type not in ("cuda", "cpu") or find_spec("bitsandbytes") is None:
        return False
    try:
        import bitsandbytes  # noqa: F401, PLC0415  registers its operators

        weight = torch.linspace(-1, 1, 4 * BLOCK, device=device)
        stored, peaks = packed(weight).stored, weight.view(-1, BLOCK).abs().amax(1)
        results = [unpack(stored, peaks, torch.float32) for unpack in (unpacked, unpacked_by_bitsandbytes)]
        return torch.allclose(*results, atol=1e-6)
    except (ImportError, AttributeError, RuntimeError) as problem:
        logger.warning("NF4 weights are unpacked without bitsandbytes, which is slower: %s", first_line(problem))
        return False
