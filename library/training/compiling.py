"""--torch_compile: the U-Net's repeated blocks compiled, one by one, so that blocks of one kind and size share code."""

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from library.errors import UserError
from library.options.groups import PrecisionOptions

logger = logging.getLogger(__name__)

REPEATED = "BasicTransformerBlock", "ResnetBlock2D"
FAILURES = torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit
SHAPES = 8  # sizes of pictures for which a block is compiled before one code is made for all of them, and to spare


def check_compiler(options: PrecisionOptions, device: torch.device) -> None:
    """Compile one addition, so that a backend or compiler that is not here is found before the model is loaded."""
    if not options.torch_compile:
        return
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder()))
    try:
        torch.compile(lambda x: x + 1, backend=options.dynamo_backend)(torch.ones(2, device=device))
    except Exception as error:
        raise UserError(
            f"--torch_compile: --dynamo_backend {options.dynamo_backend} does not work here ({reason_of(error)}); "
            "try another one, or leave --torch_compile out"
        ) from error


def cache_folder() -> Path:
    """Where compiled code outlives the run: the user's folder for caches, not that for temporary files."""
    if sys.platform == "win32":
        caches = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        caches = Path.home() / "Library" / "Caches"
    else:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return caches / "athanor" / "torch_compile"


def compile_unet(unet: nn.Module, options: PrecisionOptions) -> None:
    """Have the repeated blocks compiled at their first call, with all that is attached to them by then."""
    if not options.torch_compile:
        return
    blocks = [module for module in unet.modules() if type(module).__name__ in REPEATED]
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, SHAPES * len(blocks))  # what all blocks have together
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 2 * config.recompile_limit)
    for block in blocks:
        block._compiled_call_impl = compiled_or_plain(block, options.dynamo_backend)  # as Module.compile does


def compiled_or_plain(block: nn.Module, backend: str) -> Callable[..., Any]:
    """A block compiled as a whole; where that cannot be done it runs as it is from then on, and a line says so."""
    compiled = torch.compile(block._call_impl, backend=backend, fullgraph=True)

    def call(*inputs: Any, **named_inputs: Any) -> Any:
        try:
            return compiled(*inputs, **named_inputs)
        except FAILURES as error:
            block._compiled_call_impl = None
            name = type(block).__name__
            logger.warning("--torch_compile: a %s runs without being compiled (%s)", name, reason_of(error))
            return block._call_impl(*inputs, **named_inputs)

    return call


def reason_of(error: Exception) -> str:
    return " ".join(str(error).split()[:30])
