"""Number formats and attention: what the frozen model, the network and the computation use."""

import importlib.util
import logging

import torch
from accelerate import Accelerator
from torch import nn

from library.errors import UserError
from library.options.groups import PrecisionOptions

logger = logging.getLogger(__name__)

DTYPES = {"no": torch.float32, "float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def weight_dtype(options: PrecisionOptions) -> torch.dtype:
    """Of the frozen models."""
    return DTYPES[options.mixed_precision]


def full_dtype(options: PrecisionOptions) -> torch.dtype:
    """Of the network's own weights: fp32 but for --full_fp16 and --full_bf16."""
    return weight_dtype(options) if options.full_fp16 or options.full_bf16 else torch.float32


def save_dtype(name: str | None) -> torch.dtype | None:
    """Of the file's weights; None leaves them as they are trained."""
    return DTYPES[name] if name else None


def build_accelerator(options: PrecisionOptions) -> Accelerator:
    """Device, processes and autocast; UserError where this machine cannot do what was asked."""
    if options.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise UserError("--mixed_precision fp16 needs a GPU, and none is usable here; give bf16 or no")
    accelerator = Accelerator(mixed_precision=options.mixed_precision)
    if options.full_fp16:
        allow_fp16_gradients(accelerator.scaler)
    return accelerator


def allow_fp16_gradients(scaler: torch.amp.GradScaler) -> None:
    """Let the scaler unscale gradients that are fp16 themselves, as --full_fp16 makes them; by default it refuses."""
    unscale = scaler._unscale_grads_
    scaler._unscale_grads_ = lambda optimizer, inv_scale, found_inf, _: unscale(optimizer, inv_scale, found_inf, True)


def choose_attention(unet: nn.Module, options: PrecisionOptions, device: torch.device) -> None:
    """PyTorch's scaled-dot-product attention, which diffusers takes by itself, or xformers where it can run."""
    if not options.xformers:
        return
    if device.type != "cuda" or importlib.util.find_spec("xformers") is None:
        reason = "there is no GPU" if device.type != "cuda" else "the package is not installed"
        logger.warning("--xformers is not used, because %s; PyTorch's own attention gives the same pictures", reason)
        return
    unet.enable_xformers_memory_efficient_attention()
