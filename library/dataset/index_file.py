"""The file `.athanor_index` of a folder, as bytes: what its pictures and captions are, and what their audit found.

The head; the counts; a column for each letter of PICTURE, with a value for each picture; the same of CAPTION; all
their names; the texts of the captions; what the audit remembers. The CRC-32 is of all that follows the head.
"""

import struct
import zlib
from collections.abc import Iterable, Mapping
from functools import partial
from itertools import chain
from typing import NamedTuple

from library.dataset.caption_files import ENCODINGS, CaptionFile
from library.dataset.picture_files import Decoded

MAGIC = b"ATHANOR\x03"
HEAD = struct.Struct("<8sI")  # magic, CRC-32
COUNTS = struct.Struct("<16sIIQQ")  # listing, pictures, captions, bytes of the names, bytes of the texts
PICTURE = "IIBQIQqq"  # columns: width, height, opaque, look, colour, content, bytes, time
CAPTION = "qqB"  # bytes, time, place of the encoding in ENCODINGS
BROKEN = (OSError, ValueError, IndexError, struct.error)  # what `unpacked` raises


class Remembered(NamedTuple):
    """What is known of the files of a folder, by their names."""

    pictures: Mapping[str, Decoded]
    captions: Mapping[str, CaptionFile]
    audit: bytes = b""  # as by library.dataset.audit_memory
    listing: bytes = b""  # a digest of the names in a folder whose pictures are just these, in their order


def packed(remembered: Remembered) -> bytes:
    """The index as bytes."""
    pictures, captions, audit, listing = remembered
    place_of = {encoding: place for place, encoding in enumerate(ENCODINGS)}
    columns = _columns([(*p.size_wh, *p[1:]) for p in pictures.values()], PICTURE)
    columns += _columns([(c.num_bytes, c.mtime_ns, place_of[c.encoding]) for c in captions.values()], CAPTION)
    names = "\0".join(chain(pictures, captions)).encode("utf-8", "surrogateescape")
    texts = "\0".join([caption.text for caption in captions.values()]).encode()
    counts = COUNTS.pack(listing, len(pictures), len(captions), len(names), len(texts))
    body = b"".join((counts, columns, names, texts, audit))
    return HEAD.pack(MAGIC, zlib.crc32(body)) + body


def unpacked(data: bytes) -> Remembered:
    """What an index says; one of BROKEN where it is no index, or not a whole one."""
    magic, checksum = HEAD.unpack_from(data)
    body = memoryview(data)[HEAD.size :]
    if magic != MAGIC or zlib.crc32(body) != checksum:
        raise ValueError("not an index of this version")
    listing, num_pictures, num_captions, num_name_bytes, num_text_bytes = COUNTS.unpack_from(body)
    picture_columns, place = _unpacked_columns(body, COUNTS.size, PICTURE, num_pictures)
    caption_columns, place = _unpacked_columns(body, place, CAPTION, num_captions)
    texts_at, audit_at = place + num_name_bytes, place + num_name_bytes + num_text_bytes
    names = _split(str(body[place:texts_at], "utf-8", "surrogateescape"), num_pictures + num_captions)
    texts = _split(str(body[texts_at:audit_at], "utf-8"), num_captions)
    return Remembered(
        dict(zip(names, _pictures(*picture_columns), strict=False)),
        dict(zip(names[num_pictures:], _captions(*caption_columns, texts), strict=True)),
        bytes(body[audit_at:]),
        listing.rstrip(b"\0"),
    )


def _pictures(widths: tuple, heights: tuple, opaque: tuple, *others: tuple) -> Iterable[Decoded]:
    if 0 in widths or 0 in heights:
        raise ValueError("a picture without a size")
    rows = zip(zip(widths, heights, strict=True), map(bool, opaque), *others, strict=True)
    return map(partial(tuple.__new__, Decoded), rows)  # the NamedTuple's own constructor takes three times as long


def _captions(num_bytes: tuple, times: tuple, places: tuple, texts: list[str]) -> Iterable[CaptionFile]:
    rows = zip(num_bytes, times, map(ENCODINGS.__getitem__, places), texts, strict=True)
    return map(partial(tuple.__new__, CaptionFile), rows)


def _columns(rows: list[tuple], kinds: str) -> bytes:
    columns = zip(*rows, strict=True)
    return b"".join(struct.pack(f"<{len(rows)}{kind}", *column) for kind, column in zip(kinds, columns, strict=False))


def _unpacked_columns(body: memoryview, place: int, kinds: str, count: int) -> tuple[list[tuple], int]:
    """The columns that begin at a place, and where they end."""
    columns = []
    for kind in kinds:
        columns.append(struct.unpack_from(f"<{count}{kind}", body, place))
        place += count * struct.calcsize(f"<{kind}")
    return columns, place


def _split(text: str, count: int) -> list[str]:
    """The parts of a text, which NUL stands between."""
    parts = text.split("\0") if text or count else []
    if len(parts) != count:
        raise ValueError("parts of the index do not fit")
    return parts
