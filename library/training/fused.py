"""--fused_kernels: the U-Net's norms, SiLU and GEGLU by Triton kernels, where these are found to work."""

import logging
import os

import torch
import torch.nn.functional as F
from torch import nn

from library.layers.kernels import Kernels
from library.layers.unet_blocks import use_kernels
from library.options.groups import PrecisionOptions

logger = logging.getLogger(__name__)

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}  # of the largest number


def fuse(unet: nn.Module, options: PrecisionOptions, device: torch.device) -> None:
    """Have the U-Net's blocks use the kernels where the device can run them; else a line says why not."""
    if not options.fused_kernels or device.type == "meta":
        return
    kernels, problem = working_kernels(device)
    if kernels:
        use_kernels(unet, kernels)
    else:
        logger.warning("--fused_kernels is not used, because %s", problem)


def working_kernels(device: torch.device) -> tuple[Kernels | None, str]:
    """The kernels if what they compute is right, else why they cannot be used."""
    if device.type != "cuda" and not os.environ.get("TRITON_INTERPRET"):
        return None, "there is no NVIDIA GPU"
    try:
        from library.layers.fused_kernels import FusedKernels  # Triton is not everywhere
    except ImportError as error:
        return None, f"Triton cannot be imported ({error}): pip install triton, on Windows triton-windows"
    kernels = FusedKernels()
    try:
        wrong = [dtype for dtype, most in TOLERANCES.items() if not largest_difference(kernels, device, dtype) <= most]
    except Exception as error:  # compilers fail in many ways
        return None, f"its kernels cannot be compiled here ({' '.join(str(error).split())[:200]})"
    if wrong:
        return None, f"its kernels compute other numbers than PyTorch here in {', '.join(map(str, wrong))}"
    return kernels, ""


def largest_difference(kernels: Kernels, device: torch.device, dtype: torch.dtype) -> float:
    """Of what the kernels give from what PyTorch gives in fp32, in parts of the largest number."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    x, weight, bias, of_normal = drawn(2, 64, 33, 31) + 1, drawn(64), drawn(64), drawn(2, 64, 33, 31)
    gated, of_gated = drawn(3, 50, 2 * 40), drawn(3, 50, 40)
    full_x, full_gated = x.float().requires_grad_(), gated.float().requires_grad_()
    with torch.enable_grad():
        normal = F.silu(F.group_norm(full_x, 32, weight.float(), bias.float(), 1e-5))
        value, gate = full_gated.chunk(2, dim=-1)
        product = value * F.gelu(gate)
        right = *torch.autograd.grad(normal, full_x, of_normal.float()), normal
        right += *torch.autograd.grad(product, full_gated, of_gated.float()), product
    out, mean, rstd = kernels.group_norm(x, weight, bias, 32, 1e-5, True, dtype)
    found = kernels.group_norm_gradient(of_normal, x, mean, rstd, weight, bias, True), out
    found += kernels.geglu_gradient(of_gated, gated), kernels.geglu(gated)
    pairs = zip(found, right, strict=True)
    each = [(ours.float() - theirs).abs().max() / theirs.abs().max() for ours, theirs in pairs]
    return torch.stack(each).max().item()  # NaN if one of them is, unlike Python's max
