"""The `--network_args` of networks.dora. Needs no torch."""

from networks import lora_arguments

ARGUMENTS = lora_arguments.ARGUMENTS


def with_dora(network_args: dict[str, str]) -> dict[str, str]:
    """The same for networks.lora."""
    return network_args | {"dora": "True"}


def check_arguments(network_args: dict[str, str]) -> None:
    """UserError where `--network_args` has something that is not for DoRA."""
    lora_arguments.check_arguments(with_dora(network_args))


check_ranks = lora_arguments.check_ranks
other_ranks = lora_arguments.other_ranks
wants_convolutions = lora_arguments.wants_convolutions
wants_norms = lora_arguments.wants_norms


def needs_base_weights(network_args: dict[str, str]) -> bool:
    """The norms of a new network are those of the base model's weights."""
    return True
