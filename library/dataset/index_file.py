"""The file `.athanor_index` of a folder, as bytes: what its pictures and captions are, and what their audit found.

The head; the counts; a column for each letter of PICTURE, with a value for each picture; the same of CAPTION; all
their names; the texts of the captions; what the audit remembers. The CRC-32 is of all that follows the head.
"""

import struct
import sys
import zlib
from array import array
from collections.abc import Mapping
from functools import cached_property, partial
from itertools import chain
from typing import NamedTuple

from library.dataset.caption_files import ENCODINGS, CaptionFile
from library.dataset.config import Size
from library.dataset.picture_files import Decoded

MAGIC = b"ATHANOR\x03"
HEAD = struct.Struct("<8sI")  # magic, CRC-32
COUNTS = struct.Struct("<16sIIQQ")  # listing, pictures, captions, bytes of the names, bytes of the texts
PICTURE = "IIBQIQqq"  # columns: width, height, opaque, look, colour, content, bytes, time
CAPTION = "qqB"  # bytes, time, place of the encoding in ENCODINGS
BROKEN = (OSError, ValueError, IndexError, struct.error)  # what `StoredIndex` raises


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


class StoredIndex:
    """What the bytes of an index say; its mappings are made when they are asked for.

    Raises one of BROKEN where the bytes are no index, or not a whole one.
    """

    def __init__(self, data: bytes):
        magic, checksum = HEAD.unpack_from(data)
        body = memoryview(data)[HEAD.size :]
        if magic != MAGIC or zlib.crc32(body) != checksum:
            raise ValueError("not an index of this version")
        listing, num_pictures, num_captions, num_name_bytes, num_text_bytes = COUNTS.unpack_from(body)
        self._pictures, place = _unpacked_columns(body, COUNTS.size, PICTURE, num_pictures)
        self._captions, place = _unpacked_columns(body, place, CAPTION, num_captions)
        texts_at, audit_at = place + num_name_bytes, place + num_name_bytes + num_text_bytes
        names = _split(str(body[place:texts_at], "utf-8", "surrogateescape"), num_pictures + num_captions)
        self.names = names
        self.picture_names, self.caption_names = names[:num_pictures], names[num_pictures:]
        self.texts = _split(str(body[texts_at:audit_at], "utf-8"), num_captions)
        self.encodings = {ENCODINGS[place] for place in set(self._captions[-1])}  # that any caption has
        self.audit = bytes(body[audit_at:])
        self.listing = listing.rstrip(b"\0")
        if 0 in self._pictures[0] or 0 in self._pictures[1]:
            raise ValueError("a picture without a size")

    @property
    def statuses(self) -> array:
        """The bytes and the time of change of each of `names`, by turns."""
        (*_, picture_bytes, picture_times), (caption_bytes, caption_times, _) = self._pictures, self._captions
        statuses = array("q", bytes(16 * len(self.names)))
        statuses[::2] = picture_bytes + caption_bytes
        statuses[1::2] = picture_times + caption_times
        return statuses

    @cached_property
    def sizes(self) -> list[Size]:
        """Width and height of each picture."""
        return list(zip(*self._pictures[:2], strict=True))

    @cached_property
    def pictures(self) -> dict[str, Decoded]:
        _, _, opaque, *others = self._pictures
        rows = zip(self.sizes, map(bool, opaque), *others, strict=True)
        made = map(partial(tuple.__new__, Decoded), rows)  # the NamedTuple's own constructor takes three times as long
        return dict(zip(self.picture_names, made, strict=True))

    @cached_property
    def captions(self) -> dict[str, CaptionFile]:
        num_bytes, times, encodings = self._captions
        rows = zip(num_bytes, times, map(ENCODINGS.__getitem__, encodings), self.texts, strict=True)
        made = map(partial(tuple.__new__, CaptionFile), rows)
        return dict(zip(self.caption_names, made, strict=True))


def _columns(rows: list[tuple], kinds: str) -> bytes:
    columns = zip(*rows, strict=True)
    return b"".join(struct.pack(f"<{len(rows)}{kind}", *column) for kind, column in zip(kinds, columns, strict=False))


def _unpacked_columns(body: memoryview, place: int, kinds: str, count: int) -> tuple[list[array], int]:
    """The columns that begin at a place, and where they end."""
    columns = []
    for kind in kinds:
        column = array(kind)
        end = place + count * column.itemsize
        column.frombytes(body[place:end])
        if len(column) != count:
            raise ValueError("the index ends within a column")
        if sys.byteorder == "big":
            column.byteswap()
        columns.append(column)
        place = end
    return columns, place


def _split(text: str, count: int) -> list[str]:
    """The parts of a text, which NUL stands between."""
    parts = text.split("\0") if text or count else []
    if len(parts) != count:
        raise ValueError("parts of the index do not fit")
    return parts
