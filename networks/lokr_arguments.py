"""The `--network_args` of networks.lokr. Needs no torch."""

import logging
from typing import Any

from networks import blocks, lora_arguments
from networks.arguments import read_arguments, truth

logger = logging.getLogger(__name__)

STRUCTURE = {"decompose_both": truth, "full_matrix": truth, "use_tucker": truth}


def factor_or_any(text: str) -> int:
    """A number above 0, or -1."""
    factor = int(text) if text.removeprefix("-").isdecimal() else 0
    if factor < 1 and factor != -1:
        raise ValueError("a number above 0, or -1 for factors that are as equal as can be")
    return factor


ARGUMENTS = {**blocks.ARGUMENTS, **lora_arguments.RANKS_AND_DROPOUTS, "factor": factor_or_any, **STRUCTURE}
FILE_KNOWS = (*lora_arguments.RANK_ARGUMENTS, "factor", *STRUCTURE)  # what a file knows by itself


def read(network_args: dict[str, str]) -> dict[str, Any]:
    """The arguments with values of their types; a UserError names what is not for LoKr."""
    return read_arguments("networks.lokr", ARGUMENTS, network_args)


def check_arguments(network_args: dict[str, str]) -> None:
    """UserError where `--network_args` has something that is not for LoKr."""
    given = read(network_args)
    lora_arguments.check_together(given, {"use_tucker": ("conv_dim", "conv_block_dims")})
    if given.get("use_tucker"):
        logger.warning("--network_args: use_tucker=True: ComfyUI does not apply LoKr's convolutions in this form")


def wants_convolutions(network_args: dict[str, str]) -> bool:
    """Whether residual blocks and samplers are to be adapted too."""
    return lora_arguments.names_convolutions(read(network_args))
