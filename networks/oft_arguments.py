"""The `--network_args` of networks.oft. Needs no torch."""

from typing import Any

from library.errors import UserError
from library.families.kinds import Shapes
from library.options.groups import TrainNetworkOptions
from networks.arguments import one_of, read_arguments, truth

ARGUMENTS = {"enable_all_linear": truth, "enable_conv": truth, "names": one_of("kohya", "lycoris")}
DEFAULT_NUM_BLOCKS = 4
PARTS: dict = {}  # of files: the U-Net alone, under either name


def read(network_args: dict[str, str]) -> dict[str, Any]:
    """The arguments with values of their types; a UserError names what is not for OFT."""
    return read_arguments("networks.oft", ARGUMENTS, network_args)


def check_arguments(network_args: dict[str, str]) -> None:
    """UserError where `--network_args` has something that is not for OFT."""
    read(network_args)


def check_options(options: TrainNetworkOptions, network_args: dict[str, str]) -> None:
    """UserError where other options do not go with OFT."""
    reasons = {
        "network_dropout": "networks.oft has no dropout",
        "scale_weight_norms": "networks.oft turns weights and has no change to shrink; a small --network_alpha limits "
        "how far it turns",
        "network_train_text_encoder_only": "networks.oft trains the U-Net alone, as kohya's does",
    }
    if problems := [f"--{name}: {reason}" for name, reason in reasons.items() if getattr(options, name)]:
        raise UserError(*problems)


def check_ranks(weights: Shapes, path: str, network_dim: int | None, network_args: dict[str, str]) -> None:
    """UserError where --network_weights, whose shapes these are, has another number of blocks."""
    if other := other_ranks(weights, network_dim, network_args):
        raise UserError(f"--network_weights: {path} has {other} or --dim_from_weights")


def other_ranks(weights: Shapes, network_dim: int | None, network_args: dict[str, str]) -> str:
    """What to say of weights of another number of blocks: "8 blocks, but ...; give ..."."""
    found = {shape[0] for name, shape in weights.items() if name.endswith(".oft_blocks") and shape}
    wanted = network_dim or DEFAULT_NUM_BLOCKS
    if not found or found == {wanted}:
        return ""
    here = f"--network_dim is {wanted}" if network_dim else f"--network_dim is {wanted} where it is not given"
    return f"{min(found)} blocks a layer, but {here}; give --network_dim {min(found)}"
