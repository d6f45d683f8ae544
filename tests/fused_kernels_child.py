"""The Triton kernels on a CPU, by Triton's interpreter; a process of its own, as Triton chooses when it is imported.

Prints, as JSON, how far each result is from what PyTorch computes, in parts of the largest number.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.layers.fused_kernels import MAX_PARTS, MIN_BLOCK, FusedKernels
from library.layers.unet_blocks import GroupNormSilu, KeepsLittle, use_kernels
from library.training.fused import largest_difference, working_kernels
from tests.test_unet_blocks import gradients_of, unet_with_network

KERNELS = FusedKernels()
NORMS = [  # pictures, channels, height, width, groups
    (2, 320, 17, 18, 32),
    (1, 640, 9, 7, 32),
    (1, 1920, 8, 8, 32),
    (1, 2560, 3, 5, 32),
    (1, 20, 130, 131, 2),
    (1, 2, 300, 301, 2),
]


def apart(ours: Tensor, theirs: Tensor) -> float:
    return ((ours.double() - theirs).abs().max() / theirs.abs().max()).item()


def group_norm_errors(*shape: int, groups: int, silu: bool) -> dict[str, float]:
    """Against PyTorch's in fp64; the mean is far from 0, which takes care."""
    torch.manual_seed(0)
    x, weight, bias, gradient = torch.randn(shape) + 3, torch.randn(shape[1]), torch.randn(shape[1]), torch.randn(shape)
    full = x.double().requires_grad_()
    right = F.group_norm(full, groups, weight.double(), bias.double(), 1e-5)
    right = F.silu(right) if silu else right
    (of_x,) = torch.autograd.grad(right, full, gradient.double())
    out, mean, rstd = KERNELS.group_norm(x, weight, bias, groups, 1e-5, silu, torch.float32)
    found = KERNELS.group_norm_gradient(gradient, x, mean, rstd, weight, bias, silu)
    by_group = full.detach().view(shape[0], groups, -1)
    return {
        "out": apart(out, right.detach()),
        "gradient": apart(found, of_x),
        "mean": apart(mean, by_group.mean(2)),
        "rstd": apart(rstd, (by_group.var(2, unbiased=False) + 1e-5).rsqrt()),
    }


def geglu_errors(shape: tuple[int, ...]) -> dict[str, float]:
    torch.manual_seed(0)
    x, gradient = torch.randn(shape) * 3, torch.randn(*shape[:-1], shape[-1] // 2)
    full = x.double().requires_grad_()
    value, gate = full.chunk(2, dim=-1)
    right = value * F.gelu(gate)
    (of_x,) = torch.autograd.grad(right, full, gradient.double())
    return {
        "out": apart(KERNELS.geglu(x), right.detach()),
        "gradient": apart(KERNELS.geglu_gradient(gradient, x), of_x),
    }


def model_errors(kind: str, of: Callable[..., list[Tensor]]) -> dict[str, float]:
    """Loss and gradients of a toy model with a network, with the kernels and without."""
    found = []
    for kernels in (KERNELS, None):
        unet, network = unet_with_network(kind, True)
        use_kernels(unet, kernels)
        assert sum(isinstance(module, (KeepsLittle, GroupNormSilu)) for module in unet.modules()) > 10
        found.append(torch.cat([value.flatten() for value in of(unet, network, kind) if value is not None]))
    ours, theirs = found
    return {"loss": apart(ours[0], theirs[0].double()), "gradients": apart(ours[1:], theirs[1:].double())}


def mid_block_gradients(unet: nn.Module, network: nn.Module, kind: str) -> list[Tensor]:
    """Of the block in the middle: residual blocks, and transformers between them."""
    torch.manual_seed(0)
    x = torch.randn(1, unet.config.block_out_channels[-1], 4, 6, requires_grad=True)
    time = torch.randn(1, unet.time_embedding.linear_2.out_features)
    loss = unet.mid_block(x, time, torch.randn(1, 7, unet.config.cross_attention_dim)).square().mean()
    loss.backward()
    return [loss.detach(), x.grad, *(parameter.grad for parameter in network.parameters())]


def results(is_slow: bool) -> dict[str, dict[str, float]]:
    device = torch.device("cpu")
    kernels, problem = working_kernels(device)
    assert kernels and not problem, problem
    assert NORMS[-1][2] * NORMS[-1][3] > MAX_PARTS * MIN_BLOCK  # one with larger blocks
    found = {
        f"norm {shape}, {groups} groups, silu {silu}": group_norm_errors(*shape, groups=groups, silu=silu)
        for *shape, groups in NORMS
        for silu in (False, True)
    }
    found |= {f"geglu {shape}": geglu_errors(shape) for shape in [(2, 77, 2 * 40), (1, 3, 2 * 1025)]}
    found |= {f"mid block {kind}": model_errors(kind, mid_block_gradients) for kind in ("sd1", "sdxl")}
    if is_slow:
        found |= {f"unet {kind}": model_errors(kind, gradients_of) for kind in ("sd1", "sdxl")}
    for dtype in (torch.bfloat16, torch.float16):
        found[str(dtype)] = {"worst": largest_difference(KERNELS, device, dtype)}
    return found


if __name__ == "__main__":
    print(json.dumps(results("--slow" in sys.argv)))
