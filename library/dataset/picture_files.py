"""Picture files as they are found: their size upright, whether they decode, and why not."""

import hashlib
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from library.dataset.config import Size
from library.dataset.opened_folder import READING
from library.dataset.picture_headers import size_in_header

LOOK_WH = (72, 72)  # size at which a picture is turned upright for its look; a multiple of 9 and of 8
LOOK_MARGIN = 2  # of 255
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "DIB", "AVIF", "JXL", "GIF", "TIFF", "JPEG2000")

Progress = Callable[[int, int], None]  # called with pictures done and pictures in all


class Decoded(NamedTuple):
    """What is known of a picture that was decoded."""

    size_wh: Size  # upright
    is_opaque: bool  # nothing in it is transparent
    look: int  # as by look_of
    colour: int  # the mean of its pixels, 0xRRGGBB
    content: int  # 64 bits of the BLAKE2 hash of the file
    num_bytes: int  # of the file
    mtime_ns: int


def open_picture(path: str | Path | BinaryIO) -> Image.Image:
    """A picture whose format is one of FORMATS, whatever its name says: Pillow would run Ghostscript for others."""
    return Image.open(path, formats=_formats())


@cache
def _formats() -> tuple[str, ...]:
    """Those of FORMATS that this Pillow knows."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def exif_orientation(image: Image.Image) -> int:
    """EXIF orientation 1 to 8 of a just opened picture, from its header alone."""
    if image.format == "PNG" and "exif" not in image.info:
        return 1  # getexif() would decode the whole picture to look behind its pixels
    orientation = image.getexif().get(ExifTags.Base.Orientation)
    return orientation if orientation in range(1, 9) else 1


def upright_size(file: str) -> Size:
    """A picture's size as it is seen, from its header."""
    handle = os.open(file, READING)
    try:
        size_wh = plain_size(handle)
    finally:
        os.close(handle)
    if size_wh:
        return size_wh
    with open_picture(file) as image:
        return _upright(image)


def plain_size(handle: int) -> Size | None:
    """The size upright of a picture just opened by os.open, where its header is plain and Pillow would take it."""
    size_wh = size_in_header(handle)
    if size_wh and Image.MAX_IMAGE_PIXELS and size_wh[0] * size_wh[1] > Image.MAX_IMAGE_PIXELS:
        return None
    return size_wh


def _upright(image: Image.Image) -> Size:
    width, height = image.size
    return (height, width) if exif_orientation(image) >= 5 else (width, height)


def decode_pictures(
    files: Iterable[str],
    num_threads: int | None = None,
    progress: Progress | None = None,
    note: Callable[[str, Decoded], None] | None = None,
) -> tuple[dict[str, Decoded], list[str]]:
    """What each picture turned out to be, and names, with reasons, of those that do not decode.

    `note` is told of each picture as soon as it is known.
    """
    files = sorted(set(files))
    decoded, damaged = {}, []
    with ThreadPoolExecutor(num_threads or min(8, os.cpu_count() or 1)) as pool:
        for done, (file, result) in enumerate(zip(files, pool.map(_decoded_or_damage, files), strict=True), start=1):
            if isinstance(result, str):
                damaged.append(f"{file} ({result})")
            else:
                decoded[file] = result
                if note:
                    note(file, result)
            if progress:
                progress(done, len(files))
    return decoded, damaged


def _decoded_or_damage(path: str) -> Decoded | str:
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            content = _hash_of(file)
            with open_picture(file) as image:
                size_wh = _upright(image)
                image.draft(image.mode, (1, 1))  # JPEG: read all of the file, but build a small picture
                image.load()
                look, colour = look_of(image)
                opaque = _is_opaque(image)
            return Decoded(size_wh, opaque, look, colour, content, status.st_size, status.st_mtime_ns)
    except Exception as error:  # Pillow's readers raise many kinds on damaged files
        return unreadable_reason(path, error)


def look_of(image: Image.Image) -> tuple[int, int]:
    """A difference hash of 64 bits, and the mean colour; pictures that look alike differ in few bits of the hash.

    Its bits are those of 8 x 8 cells, upright, whose right neighbour is brighter; by a margin, so that what is nearly
    even does not decide.
    """
    plain = image if image.mode in ("L", "RGB", "RGBA") else image.convert("RGB")
    small = plain.resize(LOOK_WH, Image.Resampling.BOX, reducing_gap=1.0).convert("RGB")
    grey = ImageOps.exif_transpose(small).convert("L")
    cells = grey.resize((9, 8), Image.Resampling.BOX).tobytes()
    look = sum(1 << bit for bit in range(64) if cells[(at := bit // 8 * 9 + bit % 8) + 1] > cells[at] + LOOK_MARGIN)
    colour = small.resize((1, 1), Image.Resampling.BOX).tobytes()
    return look, int.from_bytes(colour, "big")


def _hash_of(file: BinaryIO) -> int:
    digest = hashlib.blake2b(digest_size=8)
    while block := file.read(2**20):
        digest.update(block)
    file.seek(0)
    return int.from_bytes(digest.digest(), "little")


def _is_opaque(image: Image.Image) -> bool:
    if not image.has_transparency_data:
        return True
    alpha = (image if "A" in image.getbands() else image.convert("RGBA")).getchannel("A")
    return alpha.getextrema() == (255, 255)


def unreadable_reason(path: str | Path, error: Exception) -> str:
    """Why a picture could not be opened or decoded, in a few words."""
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6} million pixels; make it smaller"
    if isinstance(error, FileNotFoundError):
        return "the file is not there any more"
    with suppress(OSError):
        if os.stat(path).st_size == 0:
            return "the file is empty"
    if isinstance(error, UnidentifiedImageError):
        return "not a picture that Pillow knows"
    return str(error) or type(error).__name__
