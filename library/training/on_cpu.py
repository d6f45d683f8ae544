"""What a run on the processor does differently: layers by way of oneDNN, and memory that is kept from step to step."""

import ctypes
import logging
import platform

import torch
from torch import nn

from library.families.base import ModelFamily
from library.layers.onednn import compute_with_onednn
from library.options.derived import unet_rounding
from library.options.groups import PrecisionOptions

logger = logging.getLogger(__name__)

BF16_FEATURES = "avx512_bf16", "amx_bf16", "bf16"  # as torch names them
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # mallopt(3)
KEPT_MEMORY = 2**30  # bytes of free memory at the end of the heap


def prepare_for_cpu(family: ModelFamily, network: nn.Module, options: PrecisionOptions) -> None:
    """Have what every step computes run fast on a processor; nothing on other devices."""
    if family.device.type != "cpu":
        if options.no_onednn and family.device.type != "meta":
            logger.warning("--no_onednn: no effect, as this run does not train on the processor")
        return
    keep_freed_memory()
    if options.no_onednn or unet_rounding(options) == "fp8" or options.torch_compile:
        return
    models = [family.unet, *(family.text_encoders if family.trains_text_encoder else ())]
    own = hasattr(network, "apply_to") and hasattr(network, "remove")  # one of another project stays attached
    if own:
        network.remove()
    for model in models:
        compute_with_onednn(model)
    if own:
        network.apply_to()


def keep_freed_memory() -> None:
    """Have glibc keep what a step frees for the next one, which else has every page of it cleared and mapped anew."""
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)  # all from the heap: a threshold for it ends at 32 MiB
        mallopt(M_TRIM_THRESHOLD, KEPT_MEMORY)


def warn_of_slow_bf16(options: PrecisionOptions, device: torch.device) -> None:
    """Say where --mixed_precision bf16 makes steps slower, not faster: the processor has no instructions for it."""
    if device.type == "cpu" and options.mixed_precision == "bf16" and computes_bf16() is False:
        logger.warning(
            "--mixed_precision bf16: this processor has no bf16 instructions; no is likely faster, and exact"
        )


def computes_bf16() -> bool | None:
    """Whether the processor has instructions for bf16; None where this torch cannot tell."""
    if not hasattr(torch.cpu, "get_capabilities"):
        return None
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in BF16_FEATURES)
