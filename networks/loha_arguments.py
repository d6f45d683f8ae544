"""The `--network_args` of networks.loha. Needs no torch."""

from typing import Any

from networks import blocks, lora_arguments
from networks.arguments import read_arguments, truth

ARGUMENTS = {**blocks.ARGUMENTS, **lora_arguments.RANKS_AND_DROPOUTS, "use_tucker": truth}
FILE_KNOWS = (*lora_arguments.RANK_ARGUMENTS, "use_tucker")  # what a file knows by itself


def read(network_args: dict[str, str]) -> dict[str, Any]:
    """The arguments with values of their types; a UserError names what is not for LoHa."""
    return read_arguments("networks.loha", ARGUMENTS, network_args)


def check_arguments(network_args: dict[str, str]) -> None:
    """UserError where `--network_args` has something that is not for LoHa."""
    lora_arguments.check_together(read(network_args), {"use_tucker": ("conv_dim", "conv_block_dims")})


def wants_convolutions(network_args: dict[str, str]) -> bool:
    """Whether residual blocks and samplers are to be adapted too."""
    return lora_arguments.names_convolutions(read(network_args))
