"""Reading a picture as it is seen, and writing one whole in the format that was asked for."""

import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from library.dataset.images import load_image
from library.dataset.picture_files import open_picture, unreadable_reason
from library.files import write_bytes_whole

_OF_ENDING = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


class Unreadable(Exception):
    """A picture that cannot be opened or decoded; the message names it with the reason."""


@dataclass(frozen=True)
class Picture:
    """A picture upright, with what has to go into the file with its pixels."""

    pixels: np.ndarray  # [H, W, 3] RGB or [H, W, 4] with transparency, uint8
    colour_profile: bytes | None = None  # ICC, where the pixels are as they were in the file

    @property
    def size_wh(self) -> tuple[int, int]:
        return self.pixels.shape[1], self.pixels.shape[0]

    @property
    def opaque(self) -> np.ndarray:
        """The pixels [H, W, 3], transparency on white."""
        return np.asarray(_on_white(Image.fromarray(self.pixels)))

    def with_pixels(self, pixels: np.ndarray) -> "Picture":
        return replace(self, pixels=pixels)


def read_picture(file: Path | BinaryIO) -> Picture:
    """The picture of a file, or of its bytes, with transparency where it has any; Unreadable where it is damaged."""
    try:
        with open_picture(file) as image:
            keep_alpha = image.has_transparency_data
            profile = image.info.get("icc_profile") if image.mode in ("RGB", "RGBA", "P") else None
        return Picture(load_image(file, keep_alpha), profile)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers raise many kinds on damaged files
        raise Unreadable(f"{file} ({unreadable_reason(str(file), error)})") from error


def ending_for(source: Path, format_name: str) -> str:
    """The ending of the file that a picture becomes; one whose own format is not written becomes a PNG file."""
    if format_name != "same":
        return f".{format_name}"
    return source.suffix if source.suffix.lower() in _OF_ENDING else ".png"


def write_picture(path: Path, picture: Picture, quality: int) -> None:
    """Write a picture in the format of the path's ending; JPEG has no transparency, which becomes white."""
    file_format = _OF_ENDING[path.suffix.lower()]
    image = Image.fromarray(picture.pixels if file_format != "JPEG" else picture.opaque)
    more = {"JPEG": {"quality": quality, "subsampling": 0}, "WEBP": {"quality": quality}}.get(file_format, {})
    data = io.BytesIO()
    image.save(data, format=file_format, icc_profile=picture.colour_profile, **more)
    write_bytes_whole(path, data.getbuffer(), durable=False)


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode != "RGBA":
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
