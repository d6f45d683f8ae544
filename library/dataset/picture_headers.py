"""Sizes of pictures from the first bytes of their files, many times faster than Pillow opens them.

Only what is plain is read here; for all else the answer is None, and Pillow is asked. Pillow decodes every picture
afterwards, so that a header that lies is found out.
"""

import os
import struct
from collections.abc import Callable

from library.dataset.config import Size

HEAD_BYTES = 4096  # enough for most headers
MAX_PARTS = 1000  # chunks or segments before the pixels

# of the parts of a file, by https://www.w3.org/TR/png-3, ITU-T T.81, RFC 9649, and TIFF 6.0 for EXIF
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
JPEG_FRAMES = frozenset({0xC0, 0xC1, 0xC2})  # baseline, extended and progressive
JPEG_SKIPPED = frozenset({0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)})  # tables, comments, APP0 to APP15
EXIF, XMP_ORIENTATION, SEVERAL_PICTURES = b"Exif\0\0", b"tiff:Orientation", b"MPF\0"
WEBP_TURNED = 0x0C  # flags of VP8X: there is EXIF or XMP, behind the pixels
TIFF_BYTES = (0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8)  # of a value of each type
ORIENTATION, SHORT = 0x0112, 3

ReadAt = Callable[[int, int], bytes]  # bytes of the file from a place on, fewer at its end


def size_in_header(handle: int) -> Size | None:
    """Width and height upright of a picture just opened by os.open, where its header is plain."""
    head = os.read(handle, HEAD_BYTES)

    def read_at(start: int, length: int) -> bytes:
        if start + length <= len(head):
            return head[start : start + length]
        os.lseek(handle, start, os.SEEK_SET)
        return os.read(handle, length)

    try:
        size_wh = _size(head, read_at)
    except (struct.error, IndexError, ValueError):
        return None
    return size_wh if size_wh and 0 not in size_wh else None


def _size(head: bytes, read_at: ReadAt) -> Size | None:
    if head.startswith(b"\xff\xd8\xff"):
        return _jpeg_size(head, read_at)
    if head.startswith(PNG_SIGNATURE):
        return _png_size(head, read_at)
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return _webp_size(head)
    if head.startswith(b"BM"):
        return _bmp_size(head)
    return None


def _png_size(head: bytes, read_at: ReadAt) -> Size | None:
    if head[8:16] != b"\0\0\0\rIHDR":
        return None
    place = 8
    for _ in range(MAX_PARTS):
        length, name = struct.unpack(">I4s", read_at(place, 8))
        if name == b"IDAT":
            return struct.unpack_from(">II", head, 16)
        if name == b"eXIf" or length > 2**31 - 1 or not name.isalpha():
            return None
        place += length + 12
    return None


def _jpeg_size(head: bytes, read_at: ReadAt) -> Size | None:
    place, orientation = 2, None
    for _ in range(MAX_PARTS):
        mark, kind, high, low = head[place : place + 4] if place + 4 <= len(head) else read_at(place, 4)
        length = high << 8 | low
        if mark != 0xFF or length < 2:
            return None
        if kind in JPEG_FRAMES:
            height, width = struct.unpack(">HH", read_at(place + 5, 4))
            return (height, width) if orientation and orientation >= 5 else (width, height)
        if kind not in JPEG_SKIPPED:
            return None
        if kind == 0xE1:
            segment = read_at(place + 4, length - 2)
            if segment.startswith(EXIF):
                before, orientation = orientation, _orientation(segment[len(EXIF) :])
                if orientation is None or before is not None:
                    return None
            elif not orientation and XMP_ORIENTATION in segment:
                return None
        elif kind == 0xE2 and read_at(place + 4, 4) == SEVERAL_PICTURES:
            return None
        place += length + 2
    return None


def _orientation(tiff: bytes) -> int | None:
    """The orientation in EXIF data, 0 where there is none; None where the data are not plain."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return None
    (place,) = struct.unpack_from(order + "I", tiff, 4)
    (num_entries,) = struct.unpack_from(order + "H", tiff, place)
    orientation = 0
    for start in range(place + 2, place + 2 + 12 * num_entries, 12):
        tag, kind, count, offset = struct.unpack_from(order + "HHII", tiff, start)
        if not 0 < kind < len(TIFF_BYTES):
            return None
        num_bytes = TIFF_BYTES[kind] * count
        if num_bytes > 4 and offset + num_bytes > len(tiff):
            return None
        if tag == ORIENTATION:
            if kind != SHORT or count != 1 or orientation:
                return None
            (orientation,) = struct.unpack_from(order + "H", tiff, start + 8)
    return orientation if orientation <= 8 else None


def _webp_size(head: bytes) -> Size | None:
    kind = head[12:16]
    if kind == b"VP8 " and head[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", head, 26)
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L" and head[20] == 0x2F:
        (bits,) = struct.unpack_from("<I", head, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8X" and not head[20] & WEBP_TURNED:
        return int.from_bytes(head[24:27], "little") + 1, int.from_bytes(head[27:30], "little") + 1
    return None


def _bmp_size(head: bytes) -> Size | None:
    header_bytes, width, height = struct.unpack_from("<III", head, 14)
    return (width, height) if header_bytes in (40, 108, 124) and max(width, height) < 2**31 else None
