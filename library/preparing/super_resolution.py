"""Enlarging pictures with a model such as Real-ESRGAN or SwinIR, tile by tile."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from library.errors import UserError, first_line

INSTALL = "pip install spandrel (it needs the torchvision of your torch: pip may replace torch otherwise)"


@dataclass(frozen=True)
class Upscaler:
    """A model that enlarges pictures by a whole number."""

    model: Callable[[torch.Tensor], torch.Tensor]  # [1, 3, H, W] in [0, 1] -> [1, 3, scale * H, scale * W]
    scale: int
    name: str
    device: torch.device
    dtype: torch.dtype = torch.float32

    def enlarged(self, pixels: np.ndarray, tile: int, overlap: int) -> np.ndarray:
        """A picture [H, W, 3] uint8 `scale` times as large; a UserError where memory does not suffice for a tile."""
        image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255  # [1, 3, H, W]
        try:
            large = enlarged_in_tiles(self._enlarged_tile, image, self.scale, tile, overlap)
        except torch.OutOfMemoryError as error:
            raise UserError(f"--tile {tile} is too large for the memory of the device; give a smaller one") from error
        return (large[0].clamp(0, 1) * 255 + 0.5).byte().permute(1, 2, 0).numpy()

    @torch.inference_mode()
    def _enlarged_tile(self, tile: torch.Tensor) -> torch.Tensor:
        return self.model(tile.to(self.device, self.dtype)).float().cpu()


def open_upscaler(path: Path, device_name: str | None = None, half: bool = False) -> Upscaler:
    """The model of a local file, of any architecture that spandrel knows."""
    try:
        import spandrel
    except Exception as error:  # torchvision of another torch raises many kinds
        reason = "is not installed" if isinstance(error, ModuleNotFoundError) else f"fails ({first_line(error)})"
        missing = getattr(error, "name", None) or "spandrel"
        raise UserError(f"--model needs the package spandrel, and {missing} {reason}: {INSTALL}") from error
    try:
        loaded = spandrel.ModelLoader(device="cpu").load_from_file(path)
    except Exception as error:  # what the file holds decides what is raised
        raise UserError(f"--model: {path} is no model that spandrel knows ({first_line(error)})") from error
    return as_upscaler(loaded, path, device_of(device_name), half)


def as_upscaler(loaded: Any, path: Path, device: torch.device, half: bool) -> Upscaler:
    """What spandrel loaded, on its device, if it enlarges RGB pictures."""
    channels = (getattr(loaded, "input_channels", 0), getattr(loaded, "output_channels", 0))
    if channels != (3, 3) or loaded.scale < 2 or not hasattr(loaded, "model"):
        raise UserError(
            f"--model: {path} does not enlarge RGB pictures (scale {loaded.scale}, {channels[0]} channels to "
            f"{channels[1]})"
        )
    if half and not loaded.supports_half:
        raise UserError(f"--fp16: {path} is not exact enough in half precision; leave it out")
    dtype = torch.float16 if half else torch.float32
    loaded.to(device, dtype).eval()
    return Upscaler(loaded, loaded.scale, loaded.architecture.name, device, dtype)


def device_of(name: str | None) -> torch.device:
    """The device of that name, else the GPU where there is one."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except Exception as error:  # each kind of device has its own
        raise UserError(f"--device: {name} cannot be used here ({first_line(error)})") from error
    return device


def enlarged_in_tiles(
    model: Callable[[torch.Tensor], torch.Tensor], image: torch.Tensor, scale: int, tile: int, overlap: int
) -> torch.Tensor:
    """What the model makes of a picture [1, 3, H, W], tile by tile, as [1, 3, scale * H, scale * W].

    Tiles have sides of at most `tile` pixels and share `overlap` with their neighbours, where one fades into the other.
    """
    height, width = image.shape[-2:]
    total = torch.zeros(1, image.shape[1], height * scale, width * scale)
    weights = torch.zeros(1, 1, height * scale, width * scale)
    places = [(top, left) for top in spans(height, tile, overlap) for left in spans(width, tile, overlap)]
    for (top, bottom), (left, right) in tqdm(places, "tiles", leave=False, disable=len(places) < 2):
        large = model(image[..., top:bottom, left:right])
        weight = (
            _ramp(top, bottom, height, overlap, scale)[:, None] * _ramp(left, right, width, overlap, scale)[None]
        )  # [scale * h, scale * w]
        area = (..., slice(top * scale, bottom * scale), slice(left * scale, right * scale))
        total[area] += large * weight
        weights[area] += weight
    return total / weights


def spans(length: int, tile: int, overlap: int) -> Iterator[tuple[int, int]]:
    """Begin and end of tiles that cover a length, all as long as the first, neighbours sharing at least `overlap`."""
    size = min(tile, length)
    starts = range(0, max(length - overlap, 1), max(size - overlap, 1))
    return iter(dict.fromkeys((min(start, length - size), min(start, length - size) + size) for start in starts))


def _ramp(begin: int, end: int, length: int, overlap: int, scale: int) -> torch.Tensor:
    """Weights [scale * (end - begin)] that rise and fall over the overlap, but not at the edges of the picture."""
    num, fade = (end - begin) * scale, overlap * scale
    weights = torch.ones(num)
    rising = (torch.arange(min(fade, num)) + 0.5) / max(fade, 1)
    if begin > 0:
        weights[: len(rising)] = torch.minimum(weights[: len(rising)], rising)
    if end < length:
        weights[num - len(rising) :] = torch.minimum(weights[num - len(rising) :], rising.flip(0))
    return weights
