"""Which files of a folder are packs of latents, and what pictures they are of. Needs no numpy.

A pack belongs to the process that its name tells of, and nobody else appends to it. Its index, at its end, says that
the process is done with it.
"""

import os
import re
import secrets
import struct
import zlib
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from library.files import MACHINE

NAME = re.compile(
    r"\.athanor_latents_(?P<family>\w+)-(?P<number>\d{6,})-(?P<machine>[0-9a-f]{6})-(?P<pid>\d+)-[0-9a-f]{8}\.pack",
    re.ASCII,
)
END = b"ATHPACK\x01"
TRAILER = struct.Struct("<8sQIIIII")  # END, and the fields of Trailer


class Trailer(NamedTuple):
    """The last bytes of a pack: where its index begins, and how large the parts of that are."""

    start: int
    num_rows: int
    row_bytes: int
    name_bytes: int
    rest_bytes: int
    checksum: int  # CRC-32 of the index

    @property
    def num_bytes(self) -> int:
        return self.row_bytes + self.name_bytes + self.rest_bytes


class Index(NamedTuple):
    """The index of a pack, its rows still as bytes."""

    start: int
    num_rows: int
    rows: bytes
    names: list[str]
    rest: bytes


def new_pack(folder: str, family: str, number: int) -> Path:
    """A name for a pack of this process; of two entries of one name that in the pack of the higher number counts."""
    writer = f"{MACHINE}-{os.getpid()}-{secrets.token_hex(4)}"
    return Path(folder, f".athanor_latents_{family}-{number:06d}-{writer}.pack")


def packs_in(folder: str, family: str) -> list[Path]:
    """The packs of a folder, oldest first; none where it cannot be listed."""
    with suppress(OSError):
        return packs_among(os.listdir(folder or "."), folder, family)
    return []


def packs_among(names: Iterable[str], folder: str, family: str) -> list[Path]:
    """Those of the files of a folder that are packs, oldest first."""
    matches = [match for name in names if (match := NAME.fullmatch(name))]
    found = sorted((int(match["number"]), match[0]) for match in matches if match["family"] == family)
    return [Path(folder, name) for _, name in found]


def number_of(name: str) -> int:
    return int(NAME.fullmatch(name)["number"])


def packed_names(names: Iterable[str], folder: str, family: str) -> set[str]:
    """What those of the files of a folder that are packs hold, under the names of the .npz files that they replace."""
    found: set[str] = set()
    for path in packs_among(names, folder, family):
        with suppress(OSError, ValueError):
            found.update(read_index(path).names)
    return found


def index_bytes(start: int, rows: bytes, names: Iterable[str], rest: bytes) -> bytes:
    """An index that is to begin at a place of its file."""
    listed = [name.encode("utf-8", "surrogateescape") for name in names]
    joined = b"\0".join(listed)
    index = b"".join((rows, joined, rest))
    return index + TRAILER.pack(END, start, len(listed), len(rows), len(joined), len(rest), zlib.crc32(index))


def read_index(path: Path) -> Index:
    """The index of a pack; OSError or ValueError where there is none, or not a whole one."""
    if not path.is_file():
        raise ValueError("not a file")  # to read a pipe would be to wait
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - TRAILER.size))
        trailer = _trailer(file.read(TRAILER.size), size)
        file.seek(trailer.start)
        data = file.read(trailer.num_bytes)
    if zlib.crc32(data) != trailer.checksum:
        raise ValueError("the index is damaged")
    names_at, rest_at = trailer.row_bytes, trailer.row_bytes + trailer.name_bytes
    names = data[names_at:rest_at].decode("utf-8", "surrogateescape").split("\0")
    if len(names) != trailer.num_rows:
        raise ValueError("parts of the index do not fit")
    return Index(trailer.start, trailer.num_rows, data[:names_at], names, data[rest_at:])


def _trailer(data: bytes, size: int) -> Trailer:
    if len(data) < TRAILER.size:
        raise ValueError("no index")
    magic, *fields = TRAILER.unpack(data)
    trailer = Trailer(*fields)
    if magic != END or trailer.start + trailer.num_bytes + TRAILER.size != size:
        raise ValueError("no index")
    return trailer
