"""The `--network_args` of networks.lora. Needs no torch."""

import logging
from math import inf
from typing import Any

from library.errors import UserError
from library.options.groups import NetworkOptions, TrainNetworkOptions
from networks import blocks, patterns
from networks.arguments import one_of, read_arguments, truth

logger = logging.getLogger(__name__)

DORA_ARGUMENTS = {"dora": truth, "wd_on_output": truth}  # the second as LyCORIS calls it
LORA_PLUS_ARGUMENTS = {
    "loraplus_lr_ratio": float,
    "loraplus_unet_lr_ratio": float,
    "loraplus_text_encoder_lr_ratio": float,
}
GGPO_ARGUMENTS = {"ggpo_sigma": float, "ggpo_beta": float}
RANKS_AND_DROPOUTS = {
    "conv_dim": int,
    "conv_alpha": float,
    "dropout": float,
    "rank_dropout": float,
    "module_dropout": float,
}
SHARED_ARGUMENTS = {**blocks.ARGUMENTS, **patterns.ARGUMENTS, **RANKS_AND_DROPOUTS, "rslora": truth}  # with LoRA-FA
ARGUMENTS = {
    **SHARED_ARGUMENTS,
    **DORA_ARGUMENTS,
    **LORA_PLUS_ARGUMENTS,
    **GGPO_ARGUMENTS,
    "init": one_of("kaiming", "orthogonal", "pissa"),
    "train_norm": truth,
    "train_bias": truth,
}
Shapes = dict[str, tuple[int, ...] | None]  # of weights by their names
DEFAULT_RANK = 4
RANK_ARGUMENTS = ("conv_dim", "conv_alpha", *blocks.RANK_ARGUMENTS, *patterns.RANK_ARGUMENTS)
OF_FILE = (*RANK_ARGUMENTS, *DORA_ARGUMENTS, "rslora", "init", "train_norm", "train_bias")  # what a file knows itself


def read(network_args: dict[str, str]) -> dict[str, Any]:
    """The arguments with values of their types; a UserError names what is not for LoRA."""
    return read_arguments("networks.lora", ARGUMENTS, network_args)


def check_arguments(network_args: dict[str, str]) -> None:
    """UserError where `--network_args` has something that is not for LoRA."""
    given = read(network_args)
    needs = {"wd_on_output": ("dora",), "ggpo_sigma": ("ggpo_beta",), "ggpo_beta": ("ggpo_sigma",)}
    check_together(given, needs)
    if problems := [
        f"--network_args: {name} must be 0 or a larger number, got {given[name]}"
        for name in GGPO_ARGUMENTS
        if not 0 <= given.get(name, 0) < inf
    ]:
        raise UserError(*problems)
    if not given.get("dora"):
        return
    if others := [name for name in ("init", "train_bias", "ggpo_sigma") if given.get(name)]:
        raise UserError(f"--network_args: {' and '.join(others)}: not with dora=True; leave out one of the two")
    if given.get("wd_on_output"):
        logger.warning(
            "--network_args: wd_on_output=True: ComfyUI applies such files a few percent off, and the Stable Diffusion "
            "WebUI far off; without it both apply them exactly"
        )


def check_together(given: dict[str, Any], more: dict[str, tuple[str, ...]]) -> None:
    """UserError for an argument that says something only beside another; `more` are those of one algorithm alone."""
    needs = {
        "conv_alpha": ("conv_dim", "conv_block_dims"),
        "conv_block_alphas": ("conv_dim", "conv_block_dims"),
        "block_lr_zero_threshold": tuple(blocks.LR_ARGUMENTS),
    }
    problems = [
        f"--network_args: {name} needs {' or '.join(needed)}"
        for name, needed in (needs | more).items()
        if name in given and not given.keys() & set(needed)
    ]
    if problems:
        raise UserError(*problems)


def check_options(options: TrainNetworkOptions, network_args: dict[str, str]) -> None:
    """UserError where other options do not go with the arguments."""
    given, problems = read(network_args), []
    if given.get("ggpo_sigma") and options.torch_compile:
        problems.append("--torch_compile: not with --network_args ggpo_sigma, whose random numbers cannot be compiled")
    problems += problems_of_pissa(options) if given.get("init") == "pissa" and not options.dim_from_weights else []
    if problems:
        raise UserError(*problems)


def problems_of_pissa(options: NetworkOptions) -> list[str]:
    """With other options."""
    problems = []
    if options.scale_weight_norms:
        problems.append("--scale_weight_norms: not with --network_args init=pissa, whose change is no product of two")
    if options.network_weights:
        problems.append(
            "--network_weights: not with --network_args init=pissa, whose files are plain LoRA of twice the rank; "
            "give --dim_from_weights to train on from one"
        )
    return problems


def needs_base_weights(network_args: dict[str, str]) -> bool:
    """Whether a new network begins with what it finds in the base model."""
    given = read(network_args)
    return given.get("dora", False) or given.get("init") == "pissa"


def check_ranks(weights: Shapes, path: str, network_dim: int | None, network_args: dict[str, str]) -> None:
    """UserError where --network_weights, whose shapes these are, has another rank than the network is to have."""
    if other := other_ranks(weights, network_dim, network_args):
        raise UserError(f"--network_weights: {path} has {other} or --dim_from_weights")


def other_ranks(weights: Shapes, network_dim: int | None, network_args: dict[str, str]) -> str:
    """What to say of weights of another rank than the network is to have: "rank 8, but ...; give ..."."""
    if {"block_dims", "network_reg_dims"} & read(network_args).keys():
        return ""
    return another_rank(weights, network_dim, "block_dims")


def another_rank(weights: Shapes, network_dim: int | None, remedy: str) -> str:
    """The same where one rank is for all layers; `remedy` is for files with several."""
    ranks = sorted(
        {
            shape[0]
            for name, shape in weights.items()
            if name.endswith(".lora_down.weight") and shape and all(side == 1 for side in shape[2:])
        }
    )
    rank = network_dim or DEFAULT_RANK
    if not ranks or ranks == [rank]:
        return ""
    found = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks from {ranks[0]} to {ranks[-1]}"
    here = f"--network_dim is {rank}" if network_dim else f"--network_dim is {rank} where it is not given"
    remedy = f"--network_dim {ranks[0]}" if len(ranks) == 1 else remedy
    return f"{found}, but {here}; give {remedy}"


def wants_norms(network_args: dict[str, str]) -> bool:
    """Whether the norms of the U-Net are to be trained too."""
    return read(network_args).get("train_norm", False)


def wants_convolutions(network_args: dict[str, str]) -> bool:
    """Whether residual blocks and samplers are to be adapted too."""
    return names_convolutions(read(network_args))


def names_convolutions(given: dict[str, Any]) -> bool:
    """The same of arguments that were read."""
    return "conv_dim" in given or "conv_block_dims" in given
