"""--blocks_to_swap: a U-Net for cards that are too small for it, whose largest blocks wait in main memory."""

import logging

from library.families.base import ModelFamily
from library.layers.swapped import CudaMover, Mover, SwappedBlocks, largest_blocks
from library.options.groups import PrecisionOptions

logger = logging.getLogger(__name__)

GIB = 2**30


def swap_blocks(family: ModelFamily, options: PrecisionOptions) -> None:
    """Have the blocks' weights move as the U-Net runs, with the network attached and the layers in their last form."""
    if not options.blocks_to_swap:
        return
    device = family.device
    if device.type not in ("cuda", "meta"):
        logger.warning("--blocks_to_swap has no effect: there is no NVIDIA GPU whose memory it would save")
        return
    blocks = largest_blocks(family.unet, options.blocks_to_swap).values()
    swapped = SwappedBlocks(family.unet, blocks, CudaMover(device) if device.type == "cuda" else Mover(device))
    if device.type == "cuda":
        logger.info("--blocks_to_swap: %s", sentence(swapped))


def sentence(swapped: SwappedBlocks) -> str:
    """What waits where, and what it costs."""
    sizes = sorted((block.num_bytes for block in swapped.blocks), reverse=True)
    waiting, present = sum(sizes) / GIB, sum(sizes[:2]) / GIB
    return (
        f"{len(sizes)} blocks of the U-Net wait in main memory ({waiting:.2f} GiB), at most 2 of them are on the GPU, "
        f"so {waiting - present:.2f} GiB of its memory are saved and up to {2 * waiting:.2f} GiB are copied in a step"
    )
