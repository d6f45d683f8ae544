"""Sizes read from headers are Pillow's, whatever is in the file; what is not plain is left to Pillow."""

import io
import os
import random
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from library.dataset.picture_files import _upright, open_picture, upright_size
from library.dataset.picture_headers import size_in_header
from tests.fuzz import mutated

SIZE_WH = (45, 31)


def saved(format_name: str, mode: str = "RGB", orientation: int | None = None, **more: object) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (*SIZE_WH[::-1], 4), dtype=np.uint8)
    exif = Image.Exif()
    if orientation is not None:
        exif[0x010F] = "maker of the camera"
        exif[0x0112] = orientation
        more["exif"] = exif
    file = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(file, format_name, **more)
    return file.getvalue()


def with_segments(jpeg: bytes, *segments: tuple[int, bytes]) -> bytes:
    """A JPEG with segments put in behind its first two bytes."""
    made = b"".join(struct.pack(">BBH", 0xFF, kind, len(data) + 2) + data for kind, data in segments)
    return jpeg[:2] + made + jpeg[2:]


def big_endian_exif(orientation: int) -> bytes:
    entry = struct.pack(">HHIHH", 0x0112, 3, 1, orientation, 0)
    return b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 1) + entry + bytes(4)


def with_texts() -> PngImagePlugin.PngInfo:
    """What image generators write, longer than what is read at once."""
    texts = PngImagePlugin.PngInfo()
    texts.add_text("parameters", "a cat, " * 3000)
    texts.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="6"/>')
    return texts


XMP = b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="6"/>'
PLAIN = {
    **{f"PNG {mode}": saved("PNG", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA")},
    "PNG with long texts": saved("PNG", pnginfo=with_texts()),
    **{f"JPEG {mode}": saved("JPEG", mode) for mode in ("L", "RGB", "CMYK")},
    "progressive JPEG": saved("JPEG", progressive=True),
    **{f"JPEG of orientation {number}": saved("JPEG", orientation=number) for number in range(1, 9)},
    "JPEG of orientation 6, big endian": with_segments(saved("JPEG"), (0xE1, big_endian_exif(6))),
    "JPEG with large segments": with_segments(
        saved("JPEG", orientation=6), (0xE2, b"ICC_PROFILE\0" + bytes(65000)), (0xED, bytes(60000)), (0xFE, b"hello")
    ),
    "JPEG with XMP": with_segments(saved("JPEG"), (0xE1, XMP.replace(b"Orientation", b"Make"))),
    "WebP": saved("WEBP"),
    "WebP without loss": saved("WEBP", lossless=True),
    "WebP with transparency": saved("WEBP", "RGBA", quality=50),
    "BMP": saved("BMP"),
}
UNUSUAL = {
    "JPEG of orientation 9": saved("JPEG", orientation=9),
    "JPEG turned by XMP": with_segments(saved("JPEG"), (0xE1, XMP)),
    "JPEG with EXIF twice": with_segments(saved("JPEG"), (0xE1, big_endian_exif(6)), (0xE1, big_endian_exif(1))),
    "JPEG with half an EXIF": with_segments(saved("JPEG"), (0xE1, big_endian_exif(6)[:20])),
    "MPO": saved("MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))]),
    **{f"PNG of orientation {number}": saved("PNG", orientation=number) for number in (1, 6)},
    **{f"WebP of orientation {number}": saved("WEBP", orientation=number) for number in (1, 6)},
    "GIF": saved("GIF"),
    "TIFF": saved("TIFF", orientation=6),
}


def in_header(path: Path) -> tuple[int, int] | None:
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    try:
        return size_in_header(handle)
    finally:
        os.close(handle)


def as_pillow_reads(path: Path) -> tuple[int, int]:
    with open_picture(path) as image:
        return _upright(image)


@pytest.mark.parametrize("what", PLAIN)
def test_a_plain_header_has_the_size_that_pillow_reads(what, tmp_path):
    path = tmp_path / "picture"
    path.write_bytes(PLAIN[what])
    assert in_header(path) == as_pillow_reads(path) in (SIZE_WH, SIZE_WH[::-1])


@pytest.mark.parametrize("what", UNUSUAL)
def test_what_is_not_plain_is_left_to_pillow(what, tmp_path):
    path = tmp_path / "picture"
    path.write_bytes(UNUSUAL[what])
    assert in_header(path) is None
    assert upright_size(str(path)) == as_pillow_reads(path)


@pytest.mark.filterwarnings("ignore")
def test_a_size_read_from_a_damaged_file_is_pillows_or_found_out_when_it_decodes(tmp_path):
    rng, path = random.Random(0), tmp_path / "picture"
    for number in range(500):
        path.write_bytes(mutated(rng.choice([*PLAIN.values(), *UNUSUAL.values()]), rng))
        size_wh = in_header(path)
        try:
            with open_picture(path) as image:
                expected = _upright(image)
                image.load()
        except Exception:  # it does not decode
            continue
        assert size_wh in (None, expected), f"case {number}"
