"""DyLoRA files (arXiv:2210.07558), whose first ranks are a LoRA each, taken apart."""

import logging
from collections.abc import Iterator
from pathlib import Path

from library.adapters.file import open_adapter
from library.errors import UserError
from library.network_files import write_weights

logger = logging.getLogger(__name__)


def split_by_rank(path: Path, unit: int, target: Path) -> Iterator[Path]:
    """Write a file for each multiple of the unit below the file's rank; its name has the rank in four digits.

    Alpha stays as it is, as in kohya's and LyCORIS' training: a rank of r is scaled by alpha / r.
    """
    file = open_adapter(path, "--model")
    others = [layer for layer in file.layers.values() if layer.algorithm != "lora"]
    if others:
        raise UserError(f"--model: {path} is no DyLoRA file: {others[0].name} is {others[0].label}")
    largest = max(layer.rank for layer in file.layers.values())
    if unit >= largest:
        raise UserError(f"--unit must be below the rank of {path}, {largest}, got {unit}")
    for rank in range(unit, largest, unit):
        weights = {}
        for layer in file.layers.values():
            tensors = {part: layer.tensor(part) for part in layer.found.keys}
            weights |= {layer.found.keys[part]: value for part, value in tensors.items()}
            weights[layer.found.keys["down"]] = tensors["down"][:rank]
            weights[layer.found.keys["up"]] = tensors["up"][:, :rank]
        comment = f"rank {rank} of a DyLoRA of rank {largest}"
        if old := file.metadata.get("ss_training_comment"):
            comment += f"; {old}"
        split = target.with_name(f"{target.stem}-{rank:04d}{target.suffix}")
        if split.exists():
            logger.warning("--save_to: %s is replaced", split)
        write_weights(
            split, weights, None, file.metadata | {"ss_training_comment": comment, "ss_network_dim": str(rank)}
        )
        yield split
