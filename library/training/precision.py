"""How the model is computed: number formats, attention, compilation, and where intermediate values are kept."""

import importlib.util
import logging
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, DataLoaderConfiguration, GradientAccumulationPlugin, InitProcessGroupKwargs
from torch import nn
from torch.utils.checkpoint import checkpoint

from library.errors import UserError, first_line
from library.families.base import Checkpoint, ModelFamily
from library.layers.fp8 import hold_in_fp8
from library.layers.int8 import hold_in_int8
from library.layers.nf4 import hold_in_nf4
from library.options.derived import has_dropout, network_module, rounds_text, unet_rounding
from library.options.groups import DistributedOptions, PrecisionOptions, TrainNetworkOptions

logger = logging.getLogger(__name__)

DTYPES = {"no": torch.float32, "float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
QUANTIZATIONS = {"fp8": hold_in_fp8, "int8": hold_in_int8, "nf4": hold_in_nf4}


def weight_dtype(options: PrecisionOptions) -> torch.dtype:
    """Of the frozen models."""
    return DTYPES[options.mixed_precision]


def full_dtype(options: PrecisionOptions) -> torch.dtype:
    """Of the network's own weights: fp32 but for --full_fp16 and --full_bf16."""
    return weight_dtype(options) if options.full_fp16 or options.full_bf16 else torch.float32


def save_dtype(name: str | None) -> torch.dtype | None:
    """Of the file's weights; None leaves them as they are trained."""
    return DTYPES[name] if name else None


def build_accelerator(options: TrainNetworkOptions) -> Accelerator:
    """Device, processes and autocast; UserError where this machine cannot do what was asked."""
    if options.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise UserError("--mixed_precision fp16 needs a GPU, and none is usable here; give bf16 or no")
    accelerator = Accelerator(
        mixed_precision=options.mixed_precision,
        dynamo_backend="no",  # not what the environment says: `compile_unet` compiles
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # the loop accumulates
        dataloader_config=DataLoaderConfiguration(split_batches=True),  # a schedule steps once, not once a process
        kwargs_handlers=[*process_group_settings(options), AutocastKwargs(enabled=needs_autocast(options))],
    )
    if options.full_fp16:
        allow_fp16_gradients(accelerator.scaler)
    return accelerator


def needs_autocast(options: TrainNetworkOptions) -> bool:
    """Whether weights and values are converted at each operation: networks of other projects count on it.

    Ours compute in the dtype of the model's frozen weights, to which the inputs of the model are converted once.
    """
    return options.mixed_precision != "no" and not network_module(options).startswith("networks.")


def process_group_settings(options: DistributedOptions) -> list[InitProcessGroupKwargs]:
    """How long processes wait for each other, where --ddp_timeout says it."""
    return [InitProcessGroupKwargs(timeout=timedelta(minutes=options.ddp_timeout))] if options.ddp_timeout else []


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


def check_fewer_bits(options: PrecisionOptions, device: torch.device) -> None:
    """Hold one small layer so and train through it: a device that cannot is found before the model is loaded."""
    for flag, hold in ways_to_hold(options).items():
        model = nn.Sequential(nn.Linear(64, 64)).requires_grad_(False).to(device, weight_dtype(options))
        x = torch.ones(32, 64, device=device, dtype=weight_dtype(options), requires_grad=True)
        try:
            hold(model)
            model(x).sum().backward()
        except (RuntimeError, TypeError) as error:
            raise UserError(
                f"{flag} does not work on this {device.type} ({first_line(error)}); leave it out"
            ) from error
    if options.base_quantization == "int8" and device.type == "cpu":
        logger.warning(
            "--base_quantization int8: on a processor only wide layers are faster by it, and steps may be slower; "
            "nf4 and --fp8_base save more memory"
        )


def ways_to_hold(options: PrecisionOptions) -> dict[str, Callable[[nn.Module], None]]:
    """The flag that is given for fewer bits, with what does it; none where models stay as they are."""
    ways = {f"--{name}": hold_in_fp8 for name in ("fp8_base", "fp8_base_unet") if getattr(options, name)}
    if options.base_quantization:
        ways[f"--base_quantization {options.base_quantization}"] = QUANTIZATIONS[options.base_quantization]
    return ways


def store_in_fewer_bits(family: ModelFamily, options: PrecisionOptions) -> None:
    """Have U-Net and, with --fp8_base, text encoders rounded as they are read."""
    if form := unet_rounding(options):
        family.hold_in(QUANTIZATIONS[form], text_too=rounds_text(options))


def checkpoint_function(options: TrainNetworkOptions) -> Checkpoint | None:
    """How --gradient_checkpointing runs a block; None is the family's usual way, which also repeats random numbers."""
    if options.cpu_offload_checkpointing:
        return checkpoint_in_main_memory
    draws = has_dropout(options) or not network_module(options).startswith("networks.")
    return None if draws else checkpoint_without_randomness


def checkpoint_without_randomness(block: nn.Module, *inputs: Any) -> Any:
    """Run a block that draws nothing; to note the state of a GPU's generator takes time, and no graph can hold it."""
    return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)


def checkpoint_in_main_memory(block: nn.Module, *inputs: Any) -> Any:
    """Run a block and keep only its inputs, in the computer's memory, until the backward pass runs it again."""
    is_cuda = any(isinstance(value, torch.Tensor) and value.is_cuda for value in inputs)
    with torch.autograd.graph.save_on_cpu(pin_memory=is_cuda):
        return checkpoint(block, *inputs, use_reentrant=False)
