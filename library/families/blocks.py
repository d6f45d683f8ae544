"""How the blocks of a U-Net are counted where ranks and learning rates differ from block to block. Needs no torch."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class BlockLayout:
    """How many blocks a U-Net has; they are numbered in the order of the fields, from 0."""

    num_down: int
    num_mid: int
    num_up: int
    num_before: int = 0  # blocks before and behind the others, whose learning rate has no weight of its own
    num_after: int = 0

    @property
    def num_blocks(self) -> int:
        return self.num_before + self.num_down + self.num_mid + self.num_up + self.num_after


SD_BLOCKS = BlockLayout(num_down=12, num_mid=1, num_up=12)  # of Stable Diffusion 1.x and 2.x


def unet_block(name: str) -> int | None:
    """The block of a U-Net layer, by its path, with dots or underscores: 0 to 11 down, 12 the middle, 13 to 24 up.

    Residual block j and attention j of a diffusers block share a number, and a sampler has that of the last of three.
    Down, the numbers are those of LDM's `input_blocks`, where 0 is the first convolution and is not adapted; up, they
    are 13 more than those of its `output_blocks`.
    """
    match = re.match(r"(down|up)_blocks[._](\d+)[._](resnets|attentions|downsamplers|upsamplers)[._](\d+)[._]", name)
    if match is None:
        return SD_BLOCKS.num_down if name.startswith(("mid_block.", "mid_block_")) else None
    first = 1 if match[1] == "down" else SD_BLOCKS.num_down + SD_BLOCKS.num_mid
    return first + 3 * int(match[2]) + (2 if match[3].endswith("samplers") else int(match[4]))
