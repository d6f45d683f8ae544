"""How much of an adapter each block of the U-Net gets, as lists of 12, 17, 20 or 26 numbers.

The lists are those of the extension sd-webui-lora-block-weight: the first number is for all that is in no block, such
as the text encoders; the others are for the blocks that attend (12 and 17), or for all there are (20 and 26). Needs no
torch.
"""

import json
import re
from dataclasses import dataclass

from library.adapters.names import kohya_name
from library.families.blocks import SD_BLOCKS, unet_block

BASE, MIDDLE = "BASE", "MID"


def _listed(downs: range | tuple[int, ...], ups: range | tuple[int, ...]) -> list[str]:
    return [BASE, *(f"IN{number:02d}" for number in downs), MIDDLE, *(f"OUT{number:02d}" for number in ups)]


LISTS = {  # by their length; SDXL has 9 blocks on each side and SD 12
    12: _listed((4, 5, 7, 8), range(6)),
    17: _listed((1, 2, 4, 5, 7, 8), range(3, 12)),
    20: _listed(range(9), range(9)),
    26: _listed(range(12), range(12)),
}


@dataclass(frozen=True)
class BlockWeights:
    """A factor for each block that a list names; 1 for the others."""

    factors: dict[str, float]

    def of(self, name: str) -> float:
        return self.factors.get(block_of(name), 1.0)


def block_of(name: str) -> str:
    """The block of a layer, by its name in a file."""
    name = kohya_name(name)
    if match := re.match(r"lora_unet_(input|output)_blocks_(\d+)_", name):
        return f"{'IN' if match[1] == 'input' else 'OUT'}{int(match[2]):02d}"
    if name.startswith(("lora_unet_middle_block_", "lora_unet_mid_block_")):
        return MIDDLE
    number = unet_block(name.removeprefix("lora_unet_")) if name.startswith("lora_unet_") else None
    if number is None:
        return BASE
    return f"IN{number:02d}" if number < SD_BLOCKS.num_down else f"OUT{number - SD_BLOCKS.num_down - 1:02d}"


def read_block_weights(text: str) -> BlockWeights:
    """The factors of a list in JSON; ValueError says what it must be."""
    try:
        numbers = json.loads(text)
    except json.JSONDecodeError:
        numbers = None
    is_list = isinstance(numbers, list) and all(type(number) in (int, float) for number in numbers)
    if not is_list or len(numbers) not in LISTS:
        raise ValueError(f"a list of {', '.join(map(str, LISTS))} numbers such as [1,0.5,...]")
    return BlockWeights(dict(zip(LISTS[len(numbers)], map(float, numbers), strict=True)))
