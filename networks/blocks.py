"""Ranks, alphas and learning rates that differ from block to block of the U-Net, as `--network_args`. Needs no torch.

Which block a layer is in, and how many blocks there are, the family says (`AdapterTarget.block` and `.layout`).
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

from library.errors import UserError
from library.families.blocks import BlockLayout

logger = logging.getLogger(__name__)

# The weight of a learning rate at a place in [0, 1], from the first to the last of the down or up blocks. Cosine is
# written as a sine, so that it ends in 0 and not near it: a block of weight 0 has no modules.
PRESETS: dict[str, Callable[[float], float]] = {
    "cosine": lambda place: math.sin(math.pi / 2 * (1 - place)),
    "sine": lambda place: math.sin(math.pi / 2 * place),
    "linear": lambda place: place,
    "reverse_linear": lambda place: 1 - place,
    "zeros": lambda place: 0.0,
}


def ranks_of_blocks(text: str) -> list[int]:
    """Whole numbers, one a block; 0 leaves a block alone."""
    try:
        ranks = [int(item) for item in text.split(",")]
    except ValueError:
        ranks = [-1]
    if min(ranks) < 0:
        raise ValueError("whole numbers from 0, separated by commas")
    return ranks


def alphas_of_blocks(text: str) -> list[float]:
    """Numbers, one a block; 0 stands for the block's rank."""
    try:
        return [float(item) for item in text.split(",")]
    except ValueError as error:
        raise ValueError("numbers, separated by commas") from error


@dataclass(frozen=True)
class LrWeights:
    """Factors on the learning rate of the blocks: a preset and what is added to it, or numbers, or one for all."""

    preset: str | None = None
    added: float = 0.0
    numbers: tuple[float, ...] = ()

    def of(self, argument: str, num_blocks: int) -> list[float]:
        """One factor a block: what lacks is 1, what is too much is left out, and a line says so."""
        if self.preset:
            last = max(1, num_blocks - 1)
            return [PRESETS[self.preset](index / last) + self.added for index in range(num_blocks)]
        given = list(self.numbers)
        if len(given) < num_blocks:
            logger.warning(
                "--network_args: %s has %d of %d numbers, the others are 1", argument, len(given), num_blocks
            )
        if len(given) > num_blocks:
            logger.warning("--network_args: %s has %d numbers, the first %d count", argument, len(given), num_blocks)
        return (given + [1.0] * num_blocks)[:num_blocks]


def listed_lr_weights(text: str) -> LrWeights:
    """Numbers separated by commas; nothing between two commas is 0."""
    try:
        return LrWeights(numbers=tuple(float(item) if item.strip() else 0.0 for item in text.split(",")))
    except ValueError as error:
        raise ValueError("numbers, separated by commas") from error


def lr_weights_or_preset(text: str) -> LrWeights:
    """The same, or a preset such as cosine+0.25, or one number for all blocks."""
    name, _, added = text.lower().replace(" ", "").partition("+")
    try:
        if name in PRESETS:
            return LrWeights(name, float(added or 0))
        if "," in text:
            return listed_lr_weights(text)
        return LrWeights("zeros", float(text))
    except ValueError as error:
        presets = ", ".join(PRESETS)
        raise ValueError(f"numbers separated by commas, one number for all, or {presets} (also cosine+0.25)") from error


RANK_ARGUMENTS = {
    "block_dims": ranks_of_blocks,
    "block_alphas": alphas_of_blocks,
    "conv_block_dims": ranks_of_blocks,
    "conv_block_alphas": alphas_of_blocks,
}
LR_ARGUMENTS = {
    "down_lr_weight": lr_weights_or_preset,
    "mid_lr_weight": listed_lr_weights,
    "up_lr_weight": lr_weights_or_preset,
}
ARGUMENTS = RANK_ARGUMENTS | LR_ARGUMENTS | {"block_lr_zero_threshold": float}


def check_layout(given: dict, layout: BlockLayout | None) -> None:
    """UserError where values for blocks are given and there are no blocks, or not as many."""
    listed = [name for name in ARGUMENTS if name in given]
    if listed and layout is None:
        raise UserError(f"--network_args: {', '.join(listed)}: no layer that is trained here is in a numbered block")
    problems = [
        f"--network_args: {name} takes {layout.num_blocks} numbers, one a block, got {len(given[name])}"
        for name in RANK_ARGUMENTS
        if name in given and len(given[name]) != layout.num_blocks
    ]
    if problems:
        raise UserError(*problems)


def block_lr_weights(given: dict, layout: BlockLayout | None) -> list[float] | None:
    """The factor on each block's learning rate, 0 where it is not above the threshold; None where none are given."""
    if layout is None or not LR_ARGUMENTS.keys() & given.keys():
        return None
    threshold = given.get("block_lr_zero_threshold", 0.0)

    def part(argument: str, num_blocks: int) -> list[float]:
        if argument not in given:
            return [1.0] * num_blocks
        return [weight if weight > threshold else 0.0 for weight in given[argument].of(argument, num_blocks)]

    return [
        *[1.0] * layout.num_before,
        *part("down_lr_weight", layout.num_down),
        *part("mid_lr_weight", layout.num_mid),
        *part("up_lr_weight", layout.num_up),
        *[1.0] * layout.num_after,
    ]


@dataclass(frozen=True)
class Ranks:
    """Rank and alpha of one kind of layer, and of the blocks that have their own; alpha 0 stands for the rank."""

    rank: int
    alpha: int | float
    block_ranks: list[int] | None = None
    block_alphas: list[float] | None = None

    def of(self, block: int | None) -> tuple[int, int | float]:
        """Rank and alpha in a block, or outside of all blocks; rank 0 means no adapter."""
        rank, alpha = self.rank, self.alpha
        if block is not None:
            rank = self.block_ranks[block] if self.block_ranks else rank
            alpha = self.block_alphas[block] if self.block_alphas else alpha
        return rank, alpha or rank
