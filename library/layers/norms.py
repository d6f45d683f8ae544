"""GroupNorm, also with SiLU behind it, and LayerNorm of frozen models, which keep little for the backward pass.

Kept are the input as it came, and statistics in fp32 whatever the input's format. What the functions give is in the
format that the layer behind computes in: that of autocast where it is on, else that of the input.
"""

from contextlib import AbstractContextManager, nullcontext
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.layers.kernels import Kernels
from library.layers.made_again import MadeAgain, forget

LOW = torch.bfloat16, torch.float16
OF_INPUT = True, False, False  # the gradients that are wanted: not those of weight and bias
_copies: WeakKeyDictionary[nn.Module, tuple] = WeakKeyDictionary()  # of norms: what they are of, and both


def group_norm(
    norm: nn.GroupNorm, x: Tensor, silu: bool, again: bool, kernels: Kernels | None = None
) -> tuple[Tensor, MadeAgain | None]:
    """[N, C, H, W] normalised, with SiLU where wanted, and how to make it again where that is wanted."""
    kernels = kernels if kernels and kernels.takes(x) else None
    dtype, x = dtype_behind(x), x.contiguous(memory_format=torch.contiguous_format if kernels else memory_format(x))
    recipe = MadeAgain(lambda: GroupNorm.apply(x.detach(), norm, silu, dtype, None, kernels)) if again else None
    return GroupNorm.apply(x, norm, silu, dtype, recipe, kernels), recipe


def layer_norm(norm: nn.LayerNorm, x: Tensor, again: bool) -> tuple[Tensor, MadeAgain | None]:
    """[..., C] normalised over C, and how to make it again where that is wanted."""
    dtype = dtype_behind(x)
    recipe = MadeAgain(lambda: LayerNorm.apply(x.detach(), norm, dtype, None)) if again else None
    return LayerNorm.apply(x, norm, dtype, recipe), recipe


class GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        norm: nn.GroupNorm,
        silu: bool,
        dtype: torch.dtype,
        recipe: MadeAgain | None,
        kernels: Kernels | None,
    ) -> Tensor:
        ctx.norm, ctx.silu, ctx.recipe, ctx.kernels = norm, silu, recipe, kernels
        if kernels:
            out, mean, rstd = kernels.group_norm(x, norm.weight, norm.bias, norm.num_groups, norm.eps, silu, dtype)
            ctx.save_for_backward(x, mean, rstd)
            return out
        ctx.form = x.shape[0], x.shape[1], x[0, 0].numel(), norm.num_groups
        weight, bias = weights_in(torch.float32, norm)
        with without_autocast(x):
            normal, mean, rstd = torch.native_group_norm(in_fp32(x), weight, bias, *ctx.form, norm.eps)
        ctx.save_for_backward(x, mean, rstd)
        return (F.silu(normal, inplace=True) if silu else normal).to(dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        forget(ctx)
        x, mean, rstd = ctx.saved_tensors
        if ctx.kernels:
            statistics = mean, rstd, ctx.norm.weight, ctx.norm.bias
            of_x = ctx.kernels.group_norm_gradient(gradient.contiguous(), x, *statistics, ctx.silu)
            return of_x, None, None, None, None, None
        weight, bias = weights_in(torch.float32, ctx.norm)
        if ctx.silu:
            gradient = torch.ops.aten.silu_backward(gradient, normalised(x, mean, rstd, weight, bias))
        full = in_fp32(x)
        gradient = gradient.to(full.dtype).contiguous(memory_format=memory_format(x))
        parts = gradient, full, mean, rstd, weight, *ctx.form, OF_INPUT
        return torch.ops.aten.native_group_norm_backward(*parts)[0].to(x.dtype), None, None, None, None, None


class LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, norm: nn.LayerNorm, dtype: torch.dtype, recipe: MadeAgain | None) -> Tensor:
        ctx.norm, ctx.recipe = norm, recipe
        with without_autocast(x):
            parts = x, norm.normalized_shape, *layer_norm_weights(norm, x), norm.eps
            normal, mean, rstd = torch.native_layer_norm(*parts)
        ctx.save_for_backward(x, mean, rstd)
        return normal.to(dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        forget(ctx)
        x, mean, rstd = ctx.saved_tensors
        gradient = gradient.to(x.dtype).contiguous()
        parts = gradient, x, ctx.norm.normalized_shape, mean, rstd, *layer_norm_weights(ctx.norm, x), OF_INPUT
        return torch.ops.aten.native_layer_norm_backward(*parts)[0], None, None, None


def normalised(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """[N, C, H, W] by the statistics [N, groups] of its groups, in fp32 or better where the input was not."""
    in_group = x.shape[1] // mean.shape[1]
    scale = rstd.repeat_interleave(in_group, 1) * weight  # [N, C]
    shift = bias - mean.repeat_interleave(in_group, 1) * scale
    return (x * scale[:, :, None, None]).add_(shift[:, :, None, None])


def layer_norm_weights(norm: nn.LayerNorm, x: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias in the format with which the device's kernel gives statistics in fp32."""
    return weights_in(torch.float32 if x.device.type == "cpu" else x.dtype, norm)


def weights_in(dtype: torch.dtype, norm: nn.GroupNorm | nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """Weight and bias of a frozen norm; where they are of another format, copies that stay until these change."""
    weight, bias = norm.weight, norm.bias
    if weight.dtype == bias.dtype == dtype or torch.compiler.is_compiling():
        return weight.to(dtype), bias.to(dtype)
    state = dtype, *((value.device, value.data_ptr(), value._version) for value in (weight, bias))
    if norm not in _copies or _copies[norm][0] != state:
        _copies[norm] = state, (weight.detach().to(dtype), bias.detach().to(dtype))
    return _copies[norm][1]


def in_fp32(x: Tensor) -> Tensor:
    """The input as GroupNorm's kernels take it for statistics in fp32; those of CPUs take any."""
    return x.float() if x.dtype in LOW and x.device.type != "cpu" else x


def memory_format(x: Tensor) -> torch.memory_format:
    """Channels last on a CPU where x has them so, else first: what GroupNorm's kernels read."""
    last = x.device.type == "cpu" and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def dtype_behind(x: Tensor) -> torch.dtype:
    """What the layer behind computes in."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Autocast would copy x to fp32 first; the kernels sum in fp32 in any case."""
    device = x.device.type
    needed = device != "meta" and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if needed else nullcontext()
