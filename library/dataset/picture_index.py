"""What was found of the files of a folder, remembered in it, so that the next start reads only what has changed.

A file `.athanor_index` beside the pictures holds what each turned out to be when it was decoded, and the contents of
the captions. A file is the same where its name, its size in bytes and its time of change are. An index that is broken,
of another version or impossible to write is done without, and nothing is said: it only saves time.
"""

import os
import struct
import zlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from library.dataset.config import Size, is_file
from library.dataset.picture_files import Decoded
from library.files import written_whole

NAME = ".athanor_index"
MAX_CAPTION_BYTES = 8192  # longer ones are read again each time

# The file: the head, which holds the CRC-32 of all that follows it; a row for each picture; a row for each caption; all
# their names; the contents of the captions.
MAGIC = b"ATHANOR\x01"
HEAD = struct.Struct("<8sIIIQ")  # magic, CRC-32, pictures, captions, bytes of the names
PICTURE_ROW = struct.Struct("<qqQQIIIB")  # bytes, time, content, look, colour, width, height, opaque
CAPTION_ROW = struct.Struct("<qq")  # bytes, time
BROKEN = (OSError, ValueError, struct.error)


class CaptionFile(NamedTuple):
    """A caption file as it was read."""

    num_bytes: int
    mtime_ns: int
    content: bytes


class FolderIndex:
    """The files of one folder as they are, and what is remembered of them."""

    def __init__(self, folder: Path):
        self.folder = folder
        with os.scandir(folder) as entries:
            self.entries = {entry.name: entry for entry in entries if is_file(entry)}
        self.pictures: dict[str, Decoded] = {}
        self.captions: dict[str, CaptionFile] = {}
        self.has_changed = False
        with suppress(*BROKEN):
            if NAME not in self.entries:
                return
            self.pictures, self.captions = unpacked((folder / NAME).read_bytes())

    def picture(self, name: str) -> Decoded | None:
        """What a picture turned out to be when it was last decoded; None where it is new or has changed."""
        known, entry = self.pictures.get(name), self.entries.get(name)
        return known if known and entry and _is_same(known, entry) else None

    def caption(self, name: str) -> bytes:
        """The content of a caption file, read where it is new or has changed."""
        known, entry = self.captions.get(name), self.entries[name]
        if known and _is_same(known, entry):
            return known.content
        status = entry.stat()
        content = (self.folder / name).read_bytes()
        if len(content) == status.st_size <= MAX_CAPTION_BYTES:
            self.captions[name] = CaptionFile(status.st_size, status.st_mtime_ns, content)
            self.has_changed = True
        return content

    def note(self, name: str, decoded: Decoded) -> None:
        """Remember what a picture turned out to be."""
        if self.pictures.get(name) != decoded:
            self.pictures[name] = decoded
            self.has_changed = True

    def write(self) -> None:
        """Write what is new, and forget files that are gone."""
        if not self.has_changed:
            return
        pictures = {name: row for name, row in self.pictures.items() if name in self.entries}
        captions = {name: row for name, row in self.captions.items() if name in self.entries}
        with suppress(OSError), written_whole(self.folder / NAME, durable=False) as temporary:
            temporary.write_bytes(packed(pictures, captions))
        self.has_changed = False


class PictureIndex:
    """The indexes of all folders of a dataset, each read when it is first asked for."""

    def __init__(self) -> None:
        self._folders: dict[str, FolderIndex] = {}

    def folder(self, folder: Path) -> FolderIndex:
        """The index of a folder; OSError where the folder cannot be listed."""
        if str(folder) not in self._folders:
            self._folders[str(folder)] = FolderIndex(folder)
        return self._folders[str(folder)]

    def size_of(self, path: Path) -> Size | None:
        """The size of a picture that has not changed since it was decoded."""
        with suppress(OSError):
            known = self._folder_of(path).picture(path.name)
            return known and known.size_wh
        return None

    def known(self, paths: Iterable[Path]) -> dict[Path, Decoded]:
        """What those of some pictures turned out to be that have not changed since they were decoded."""
        found = ((path, self._folder_of(path).picture(path.name)) for path in paths)
        return {path: decoded for path, decoded in found if decoded}

    def note(self, path: Path, decoded: Decoded) -> None:
        """Remember what a picture turned out to be."""
        self._folder_of(path).note(path.name, decoded)

    def write(self) -> None:
        """Write the indexes that changed."""
        for folder in self._folders.values():
            folder.write()

    def _folder_of(self, path: Path) -> FolderIndex:
        return self._folders.get(os.path.dirname(path)) or self.folder(path.parent)


def packed(pictures: Mapping[str, Decoded], captions: Mapping[str, CaptionFile]) -> bytes:
    """The index as bytes."""
    rows = b"".join(
        PICTURE_ROW.pack(p.num_bytes, p.mtime_ns, p.content, p.look, p.colour, *p.size_wh, p.is_opaque)
        for p in pictures.values()
    )
    rows += b"".join(CAPTION_ROW.pack(caption.num_bytes, caption.mtime_ns) for caption in captions.values())
    names = "\0".join([*pictures, *captions]).encode("utf-8", "surrogateescape")
    body = b"".join([rows, names, *(caption.content for caption in captions.values())])
    return HEAD.pack(MAGIC, zlib.crc32(body), len(pictures), len(captions), len(names)) + body


def unpacked(data: bytes) -> tuple[dict[str, Decoded], dict[str, CaptionFile]]:
    """Pictures and captions of an index; one of BROKEN where it is no index, or not a whole one."""
    magic, checksum, num_pictures, num_captions, num_name_bytes = HEAD.unpack_from(data)
    body = memoryview(data)[HEAD.size :]
    if magic != MAGIC or zlib.crc32(body) != checksum:
        raise ValueError("not an index of this version")
    names_at = num_pictures * PICTURE_ROW.size + num_captions * CAPTION_ROW.size
    contents_at = names_at + num_name_bytes
    names = str(body[names_at:contents_at], "utf-8", "surrogateescape").split("\0")
    pictures = {
        name: Decoded((width, height), bool(is_opaque), look, colour, content, num_bytes, mtime_ns)
        for name, (num_bytes, mtime_ns, content, look, colour, width, height, is_opaque) in zip(
            names[:num_pictures], PICTURE_ROW.iter_unpack(body[: num_pictures * PICTURE_ROW.size]), strict=True
        )
    }
    captions = {}
    rows = CAPTION_ROW.iter_unpack(body[num_pictures * PICTURE_ROW.size : names_at])
    for name, (num_bytes, mtime_ns) in zip(names[num_pictures:], rows, strict=num_captions > 0):
        captions[name] = CaptionFile(num_bytes, mtime_ns, bytes(body[contents_at : contents_at + num_bytes]))
        contents_at += num_bytes
    if contents_at != len(body) or any(0 in picture.size_wh for picture in pictures.values()):
        raise ValueError("parts of the index do not fit")
    return pictures, captions


def _is_same(known: Decoded | CaptionFile, entry: os.DirEntry) -> bool:
    status = entry.stat()
    return (status.st_size, status.st_mtime_ns) == (known.num_bytes, known.mtime_ns)
