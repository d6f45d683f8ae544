"""GroupNorm with SiLU, and GEGLU, as Triton kernels: what takes PyTorch five and three passes takes two and one.

For NVIDIA GPUs; `library/training/fused.py` looks whether they work there. They sum in fp32, always in the same order,
and keep for the backward pass what the plain functions keep. With TRITON_INTERPRET=1 they run on a CPU, slowly.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

FORMATS = torch.float32, torch.bfloat16, torch.float16
MIN_BLOCK, MAX_BLOCK = 1024, 8192  # numbers that one program takes
MAX_PARTS = 64  # of a group of channels, while blocks can be larger
NUM_WARPS = 4  # at least
WARP_SHARE = 512  # numbers of a larger block for one warp: with 16 in each thread, registers suffice for many warps


@triton.jit
def _moments(x_at, means_at, squares_at, length, parts, BLOCK: tl.constexpr):
    """Of one part of one group: the mean, and the sum of squared differences from it."""
    group, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = part * BLOCK + tl.arange(0, BLOCK)
    inside = place < length
    x = tl.load(x_at + group * length + place, mask=inside, other=0.0).to(tl.float32)
    count = tl.minimum(length - part * BLOCK, BLOCK).to(tl.float32)
    mean = tl.sum(x, 0) / count
    difference = tl.where(inside, x - mean, 0.0)
    tl.store(means_at + group * parts + part, mean)
    tl.store(squares_at + group * parts + part, tl.sum(difference * difference, 0))


@triton.jit
def _statistics(means_at, squares_at, group, length, parts, eps, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """Mean and 1 / standard deviation of a group from its parts (Chan et al. 1979, eq. 2.1)."""
    part = tl.arange(0, PARTS)
    there = part < parts
    counts = tl.where(there, tl.minimum(length - part * BLOCK, BLOCK), 0).to(tl.float32)
    means = tl.load(means_at + group * parts + part, mask=there, other=0.0)
    squares = tl.load(squares_at + group * parts + part, mask=there, other=0.0)
    mean = tl.sum(means * counts, 0) / length
    apart = means - mean
    variance = (tl.sum(squares, 0) + tl.sum(apart * apart * counts, 0)) / length
    return mean, 1.0 / tl.sqrt(variance + eps)


@triton.jit
def _normalise(
    x_at,
    weight_at,
    bias_at,
    means_at,
    squares_at,
    out_at,
    mean_at,
    rstd_at,
    length,
    pixels,
    groups,
    channels_in_group,
    parts,
    eps,
    SILU: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    group, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    mean, rstd = _statistics(means_at, squares_at, group, length, parts, eps, BLOCK, PARTS)
    if part == 0:
        tl.store(mean_at + group, mean)
        tl.store(rstd_at + group, rstd)
    place = part * BLOCK + tl.arange(0, BLOCK)
    inside = place < length
    x = tl.load(x_at + group * length + place, mask=inside, other=0.0).to(tl.float32)
    channel = (group % groups) * channels_in_group + place // pixels
    weight = tl.load(weight_at + channel, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_at + channel, mask=inside, other=0.0).to(tl.float32)
    out = (x - mean) * rstd * weight + bias
    if SILU:
        out = out * tl.sigmoid(out)
    tl.store(out_at + group * length + place, out.to(out_at.dtype.element_ty), mask=inside)


@triton.jit
def _weighted(
    gradient_at,
    x_at,
    weight_at,
    bias_at,
    mean_at,
    rstd_at,
    group,
    place,
    inside,
    length,
    pixels,
    groups,
    channels_in_group,
    SILU: tl.constexpr,
):
    """The normalised input, and the gradient of it, which is 0 outside."""
    x = tl.load(x_at + group * length + place, mask=inside, other=0.0).to(tl.float32)
    gradient = tl.load(gradient_at + group * length + place, mask=inside, other=0.0).to(tl.float32)
    channel = (group % groups) * channels_in_group + place // pixels
    weight = tl.load(weight_at + channel, mask=inside, other=0.0).to(tl.float32)
    normal = tl.where(inside, (x - tl.load(mean_at + group)) * tl.load(rstd_at + group), 0.0)
    if SILU:
        bias = tl.load(bias_at + channel, mask=inside, other=0.0).to(tl.float32)
        before = normal * weight + bias
        sigmoid = tl.sigmoid(before)
        gradient = gradient * sigmoid * (1.0 + before * (1.0 - sigmoid))
    return normal, gradient * weight


@triton.jit
def _gradient_sums(
    gradient_at,
    x_at,
    weight_at,
    bias_at,
    mean_at,
    rstd_at,
    sums_at,
    products_at,
    length,
    pixels,
    groups,
    channels_in_group,
    parts,
    SILU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    group, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = part * BLOCK + tl.arange(0, BLOCK)
    normal, weighted = _weighted(
        gradient_at,
        x_at,
        weight_at,
        bias_at,
        mean_at,
        rstd_at,
        group,
        place,
        place < length,
        length,
        pixels,
        groups,
        channels_in_group,
        SILU,
    )
    tl.store(sums_at + group * parts + part, tl.sum(weighted, 0))
    tl.store(products_at + group * parts + part, tl.sum(weighted * normal, 0))


@triton.jit
def _input_gradient(
    gradient_at,
    x_at,
    weight_at,
    bias_at,
    mean_at,
    rstd_at,
    sums_at,
    products_at,
    out_at,
    length,
    pixels,
    groups,
    channels_in_group,
    parts,
    SILU: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    group, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    each = tl.arange(0, PARTS)
    there = each < parts
    of_mean = tl.sum(tl.load(sums_at + group * parts + each, mask=there, other=0.0), 0) / length
    of_rstd = tl.sum(tl.load(products_at + group * parts + each, mask=there, other=0.0), 0) / length
    place = part * BLOCK + tl.arange(0, BLOCK)
    inside = place < length
    normal, weighted = _weighted(
        gradient_at,
        x_at,
        weight_at,
        bias_at,
        mean_at,
        rstd_at,
        group,
        place,
        inside,
        length,
        pixels,
        groups,
        channels_in_group,
        SILU,
    )
    out = tl.load(rstd_at + group) * (weighted - of_mean - normal * of_rstd)
    tl.store(out_at + group * length + place, out.to(out_at.dtype.element_ty), mask=inside)


@triton.jit
def _geglu(x_at, out_at, total, width, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < total
    value_at = x_at + (place // width) * 2 * width + place % width
    value = tl.load(value_at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(value_at + width, mask=inside, other=0.0).to(tl.float32)
    out = value * gate * 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
    tl.store(out_at + place, out.to(out_at.dtype.element_ty), mask=inside)


@triton.jit
def _geglu_gradient(gradient_at, x_at, out_at, total, width, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < total
    to_value = (place // width) * 2 * width + place % width
    gradient = tl.load(gradient_at + place, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(x_at + to_value, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(x_at + to_value + width, mask=inside, other=0.0).to(tl.float32)
    share = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
    density = 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    of_value, of_gate = gradient * gate * share, gradient * value * (share + gate * density)
    tl.store(out_at + to_value, of_value.to(out_at.dtype.element_ty), mask=inside)
    tl.store(out_at + to_value + width, of_gate.to(out_at.dtype.element_ty), mask=inside)


class FusedKernels:
    """The kernels as functions of tensors; see `Kernels`."""

    def takes(self, x: Tensor) -> bool:
        return x.dtype in FORMATS and x.numel() > 0

    def group_norm(
        self, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        form = _Form(x, groups)
        mean, rstd = x.new_empty(2, x.shape[0], groups, dtype=torch.float32)
        means, squares = x.new_empty(2, form.rows, form.parts, dtype=torch.float32)
        out = torch.empty_like(x, dtype=dtype)
        _moments[form.grid](x, means, squares, form.length, form.parts, BLOCK=form.block, num_warps=form.warps)
        given = x, weight, bias, means, squares, out, mean, rstd, *form.sizes, form.parts, eps
        _normalise[form.grid](*given, SILU=silu, BLOCK=form.block, PARTS=form.most_parts, num_warps=form.warps)
        return out, mean, rstd

    def group_norm_gradient(
        self, gradient: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, silu: bool
    ) -> Tensor:
        form = _Form(x, mean.shape[1])
        sums, products = x.new_empty(2, form.rows, form.parts, dtype=torch.float32)
        out = torch.empty_like(x)
        given = gradient, x, weight, bias, mean, rstd, sums, products
        rest = *form.sizes, form.parts
        _gradient_sums[form.grid](*given, *rest, SILU=silu, BLOCK=form.block, num_warps=form.warps)
        _input_gradient[form.grid](
            *given, out, *rest, SILU=silu, BLOCK=form.block, PARTS=form.most_parts, num_warps=form.warps
        )
        return out

    def geglu(self, x: Tensor) -> Tensor:
        width = x.shape[-1] // 2
        out = x.new_empty(*x.shape[:-1], width)
        grid = (triton.cdiv(out.numel(), MIN_BLOCK),)
        _geglu[grid](x, out, out.numel(), width, BLOCK=MIN_BLOCK, num_warps=NUM_WARPS)
        return out

    def geglu_gradient(self, gradient: Tensor, x: Tensor) -> Tensor:
        out, total, width = torch.empty_like(x), gradient.numel(), gradient.shape[-1]
        grid = (triton.cdiv(total, MIN_BLOCK),)
        _geglu_gradient[grid](gradient, x, out, total, width, BLOCK=MIN_BLOCK, num_warps=NUM_WARPS)
        return out


class _Form:
    """How a tensor is cut into groups, and those into parts of one program each."""

    def __init__(self, x: Tensor, groups: int):
        channels, pixels = x.shape[1], math.prod(x.shape[2:])
        self.rows, self.length = x.shape[0] * groups, channels // groups * pixels
        self.block = min(max(triton.next_power_of_2(triton.cdiv(self.length, MAX_PARTS)), MIN_BLOCK), MAX_BLOCK)
        self.warps = max(NUM_WARPS, self.block // WARP_SHARE)
        self.parts = triton.cdiv(self.length, self.block)
        self.most_parts = triton.next_power_of_2(self.parts)
        self.sizes = self.length, pixels, groups, channels // groups
        self.grid = (self.rows, self.parts)
