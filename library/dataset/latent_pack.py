"""One pack: many latents in a file that only grows, each entry whole in itself, and an index of them at the end.

An entry is a head, with a checksum, and the numbers behind it: latents, mirrored latents, mask, all float32. Where the
index is missing, as the writer was killed, `repair` finds the whole entries by their heads, cuts what is behind them
off, and adds the index.
"""

import os
import struct
import time
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from library.dataset.cache import CachedLatents, Origin
from library.dataset.file_marks import FileMark
from library.dataset.pack_files import index_bytes, read_index
from library.errors import CannotWrite, UserError
from library.files import failed_writes_told, flush_to_disk

HEAD = struct.Struct("<8sIHHH")  # HEAD_MARK, CRC-32 of what follows, bytes of the name, the resizing, the VAE's sketch
HEAD_MARK = b"ATHLAT\x01\n"
SHAPE, LENGTH = struct.Struct("<HHH"), struct.Struct("<I")
UNREADABLE = (OSError, ValueError, struct.error)  # what `read_entries` raises
ALIGNED = 64  # bytes: where numbers begin, and where entries do
ROW = np.dtype(
    [
        ("entry", "<u8"),  # where it begins in its file
        ("numbers", "<u8"),  # where they begin; 0 where the latents that stood here were of no use
        ("num_bytes", "<u8"),  # of the numbers
        ("written_ns", "<i8"),
        ("picture", "<i8", 3),  # its FileMark
        ("mask", "<i8", 3),  # that of its mask picture, if it has one
        ("crop_ltrb", "<f8", 4),
        ("size_wh", "<u4", 2),
        ("shape", "<u4", 3),  # of the latents: C, h, w
        ("checksum", "<u4"),  # CRC-32 of the numbers
        ("vae", "<u4"),  # which of the sketches of its file, from 1; 0 where it is not known what it was made from
        ("mirrored", "u1"),
        ("masked", "u1"),
        ("has_mask_picture", "u1"),
    ]
)


class Entries(NamedTuple):
    """All entries of a pack, in columns; the texts are those of Origin."""

    rows: np.ndarray  # [N] of ROW
    names: list[str]
    resized: list[str]
    sketches: list[np.ndarray]  # [C, h, w] each, of the VAEs
    end: int  # of the last one, where the index begins


@dataclass
class Noted:
    """What the writer of a pack remembers of an entry."""

    row: bytes  # a ROW
    name: str
    resized: str


class PackWriter:
    """Appends entries to a new pack, and at last its index; a UserError where that cannot be written."""

    def __init__(self, path: Path):
        self.path = path
        self.end = 0
        self.noted: list[Noted] = []
        self.sketches: dict[bytes, int] = {}  # packed -> its number, from 1

    def add(self, name: str, cached: CachedLatents, origin: Origin | None, written_ns: int | None = None) -> None:
        """Append latents; a mirrored picture or mask of a size that does not fit them is left out."""
        row, (channels, height, width) = np.zeros((), ROW), cached.latents.shape
        row["written_ns"] = time.time_ns() if written_ns is None else written_ns
        flipped, mask = cached.latents_flipped, cached.alpha_mask
        parts = [cached.latents]
        if flipped is not None and flipped.shape == cached.latents.shape:
            row["mirrored"] = 1
            parts.append(flipped)
        if mask is not None and mask.shape == (8 * height, 8 * width):
            row["masked"] = 1
            parts.append(mask)
        row["shape"], row["size_wh"] = (channels, height, width), cached.original_size_wh
        row["crop_ltrb"] = cached.crop_ltrb
        self._append(row, name, origin, b"".join([part.astype(np.float32).tobytes() for part in parts]))

    def add_useless(self, name: str) -> None:
        """Note that latents in an older pack are damaged."""
        self._append(np.zeros((), ROW), name, None, b"")

    def finish(self) -> None:
        """Add the index, without which a pack counts as being written."""
        if self.noted:
            self._write(_index(self.end, self.noted, self.sketches))
            with suppress(OSError):  # the entries are there, and checked when they are read
                flush_to_disk(self.path)

    def _append(self, row: np.ndarray, name: str, origin: Origin | None, numbers: bytes) -> None:
        sketch = b""
        if origin:
            sketch = _packed_sketch(origin.vae)
            row["vae"] = self.sketches.setdefault(sketch, len(self.sketches) + 1)
            row["picture"] = astuple(origin.picture)
            row["has_mask_picture"] = origin.mask is not None
            row["mask"] = astuple(origin.mask) if origin.mask else 0
        resized = origin.resized if origin else ""
        texts = name.encode("utf-8", "surrogateescape"), resized.encode(), sketch
        row["entry"], row["num_bytes"] = self.end, len(numbers)
        row["checksum"] = zlib.crc32(numbers)
        if numbers:
            row["numbers"] = self.end + _aligned(HEAD.size + ROW.itemsize + sum(map(len, texts)))
        body = b"".join((row.tobytes(), *texts))
        head = HEAD.pack(HEAD_MARK, zlib.crc32(body), *map(len, texts)) + body
        data = b"".join((head, bytes(-len(head) % ALIGNED), numbers, bytes(-len(numbers) % ALIGNED)))
        self._write(data)
        self.end += len(data)
        self.noted.append(Noted(row.tobytes(), name, resized))

    def _write(self, data: bytes) -> None:
        """Put bytes behind the last entry; where they do not all fit there, none of them stay."""
        try:
            with failed_writes_told(self.path, len(data)):
                try:
                    with open(self.path, "r+b" if self.end else "wb", buffering=0) as file:
                        file.seek(self.end)
                        _write_all(file, data)
                        file.truncate()  # what an interrupted attempt left
                except OSError:
                    self._cut()
                    raise
        except CannotWrite as error:
            advice = "--cache_latents alone keeps them in memory"
            raise UserError(f"latents cannot be written to {self.path}: {error.strerror}; {advice}") from error

    def _cut(self) -> None:
        with suppress(OSError):
            if self.end:
                os.truncate(self.path, self.end)
            else:
                self.path.unlink()


def read_entries(path: Path) -> Entries:
    """The entries of a pack as its index has them; one of UNREADABLE where there is none, or a damaged one."""
    index = read_index(path)
    if len(index.rows) != index.num_rows * ROW.itemsize:
        raise ValueError("parts of the index do not fit")
    rows = np.frombuffer(index.rows, ROW)
    resized_bytes = LENGTH.unpack_from(index.rest)[0]
    texts, sketches = _split(index.rest[LENGTH.size :], (resized_bytes, len(index.rest)))
    resized = texts.decode("utf-8", "replace").split("\0")
    if len(resized) != len(rows):
        raise ValueError("parts of the index do not fit")
    entries = Entries(rows, index.names, resized, list(_sketches(sketches)), index.start)
    _check(entries)
    return entries


def repair(path: Path) -> int:
    """Give a pack whose writer was killed its index, cutting off what is torn; the number of its whole entries."""
    if not path.is_file():
        raise OSError("not a file")  # to read a pipe would be to wait
    noted, sketches, end = [], {}, 0
    with open(path, "rb") as file:
        for item, sketch, end in _walked(file):  # noqa: B007  the last end counts
            noted.append(item)
            if sketch:
                sketches.setdefault(sketch, len(sketches) + 1)
    if noted:
        with open(path, "r+b") as file:
            file.truncate(end)
            file.seek(end)
            file.write(_index(end, noted, sketches))
        flush_to_disk(path)
    else:
        path.unlink()
    return len(noted)


def numbers_of(row: np.ndarray, data: memoryview) -> list[np.ndarray]:
    """The arrays of an entry, of the bytes of its numbers."""
    channels, height, width = row["shape"].tolist()
    shapes = [(channels, height, width)] * (1 + bool(row["mirrored"])) + [(8 * height, 8 * width)] * bool(row["masked"])
    arrays, start = [], 0
    for shape in shapes:
        count = int(np.prod(shape))
        arrays.append(np.frombuffer(data, "<f4", count, start).reshape(shape).copy())
        start += 4 * count
    return arrays


def origin_of(entries: Entries, place: int) -> Origin | None:
    """What an entry was made from, where that is known."""
    row = entries.rows[place]
    if not row["vae"]:
        return None
    mask = FileMark.from_array(row["mask"]) if row["has_mask_picture"] else None
    sketch = entries.sketches[int(row["vae"]) - 1]
    return Origin(FileMark.from_array(row["picture"]), mask, entries.resized[place], sketch)


def _walked(file: BinaryIO) -> Iterator[tuple[Noted, bytes, int]]:
    """The whole entries of a file up to the first that is not: each with its sketch, and where it ends."""
    end = 0
    while True:
        file.seek(end)
        head = file.read(HEAD.size)
        if len(head) < HEAD.size:
            return
        magic, checksum, *sizes = HEAD.unpack(head)
        body = file.read(ROW.itemsize + sum(sizes))
        if magic != HEAD_MARK or zlib.crc32(body) != checksum or len(body) < ROW.itemsize + sum(sizes):
            return
        packed, row = body[: ROW.itemsize], np.frombuffer(body, ROW, 1)[0]
        name, resized, sketch = _split(body[ROW.itemsize :], sizes)
        numbers_at, num_bytes = int(row["numbers"]), int(row["num_bytes"])
        if numbers_at:
            file.seek(end + _aligned(HEAD.size + len(body)))
            if int(row["entry"]) != end or numbers_at != file.tell() or num_bytes > os.fstat(file.fileno()).st_size:
                return
            numbers = file.read(num_bytes)
            if len(numbers) < num_bytes or zlib.crc32(numbers) != row["checksum"]:
                return
        end += _aligned(HEAD.size + len(body)) + (_aligned(num_bytes) if numbers_at else 0)
        yield Noted(packed, name.decode("utf-8", "surrogateescape"), resized.decode("utf-8", "replace")), sketch, end


def _index(start: int, noted: list[Noted], sketches: dict[bytes, int]) -> bytes:
    rows, resized = b"".join([item.row for item in noted]), "\0".join([item.resized for item in noted]).encode()
    rest = b"".join((LENGTH.pack(len(resized)), resized, *sketches))
    return index_bytes(start, rows, [item.name for item in noted], rest)


def _check(entries: Entries) -> None:
    """ValueError where a row tells of bytes that are not there."""
    rows = entries.rows
    channels, height, width = rows["shape"].astype(float).T  # which does not overflow
    arrays = channels * height * width * (1 + (rows["mirrored"] != 0)) + 64 * height * width * (rows["masked"] != 0)
    is_inside = rows["numbers"].astype(float) + rows["num_bytes"] <= entries.end
    if not (is_inside & (rows["num_bytes"] == 4 * arrays) & (rows["vae"] <= len(entries.sketches))).all():
        raise ValueError("a row does not fit its file")


def _packed_sketch(sketch: np.ndarray) -> bytes:
    return SHAPE.pack(*sketch.shape) + sketch.astype(np.float32).tobytes()


def _sketches(data: bytes) -> Iterator[np.ndarray]:
    place = 0
    while place < len(data):
        shape = SHAPE.unpack_from(data, place)
        place += SHAPE.size
        yield np.frombuffer(data, "<f4", int(np.prod(shape)), place).reshape(shape)
        place += 4 * int(np.prod(shape))


def _split(data: bytes, sizes: Iterable[int]) -> list[bytes]:
    ends = np.cumsum([0, *sizes]).tolist()
    return [data[start:end] for start, end in zip(ends, ends[1:], strict=False)]


def _aligned(size: int) -> int:
    return size + -size % ALIGNED


def _write_all(file: BinaryIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
