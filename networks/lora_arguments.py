"""The `--network_args` of networks.lora. Needs no torch."""

from typing import Any

from library.errors import UserError
from networks import blocks
from networks.arguments import read_arguments

ARGUMENTS = {
    **blocks.ARGUMENTS,
    "conv_dim": int,
    "conv_alpha": float,
    "dropout": float,
    "rank_dropout": float,
    "module_dropout": float,
    "loraplus_lr_ratio": float,
    "loraplus_unet_lr_ratio": float,
    "loraplus_text_encoder_lr_ratio": float,
}
RANK_ARGUMENTS = ("conv_dim", "conv_alpha", *blocks.RANK_ARGUMENTS)  # what a file knows by itself


def read(network_args: dict[str, str]) -> dict[str, Any]:
    """The arguments with values of their types; a UserError names what is not for LoRA."""
    return read_arguments("networks.lora", ARGUMENTS, network_args)


def check_arguments(network_args: dict[str, str]) -> None:
    """UserError where `--network_args` has something that is not for LoRA."""
    given = read(network_args)
    needs = {
        "conv_alpha": ("conv_dim", "conv_block_dims"),
        "conv_block_alphas": ("conv_dim", "conv_block_dims"),
        "block_lr_zero_threshold": tuple(blocks.LR_ARGUMENTS),
    }
    problems = [
        f"network_args: {name} needs {' or '.join(needed)}"
        for name, needed in needs.items()
        if name in given and not given.keys() & set(needed)
    ]
    if problems:
        raise UserError(*problems)


def wants_convolutions(network_args: dict[str, str]) -> bool:
    """Whether residual blocks and samplers are to be adapted too."""
    given = read(network_args)
    return "conv_dim" in given or "conv_block_dims" in given
