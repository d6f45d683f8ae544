"""The `--network_args` of networks.lora_fa. Needs no torch."""

from typing import Any

from networks import lora_arguments
from networks.arguments import read_arguments
from networks.lora_arguments import check_ranks as check_ranks
from networks.lora_arguments import other_ranks as other_ranks
from networks.lora_arguments import wants_convolutions as wants_convolutions

ARGUMENTS = lora_arguments.SHARED_ARGUMENTS


def read(network_args: dict[str, str]) -> dict[str, Any]:
    """The arguments with values of their types; a UserError names what is not for LoRA-FA."""
    return read_arguments("networks.lora_fa", ARGUMENTS, network_args)


def check_arguments(network_args: dict[str, str]) -> None:
    """UserError where `--network_args` has something that is not for LoRA-FA."""
    lora_arguments.check_together(read(network_args), {})
