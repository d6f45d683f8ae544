"""What was found of the files of a folder, remembered in it, so that the next start reads only what has changed.

A file `.athanor_index` beside the pictures holds what each turned out to be when it was decoded, and the texts of the
captions. A file is the same where its name, its size in bytes and its time of change are. An index that is broken,
of another version or impossible to write is done without, and nothing is said: it only saves time.
"""

import os
import struct
import zlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from itertools import starmap
from pathlib import Path

from library.dataset.caption_files import ENCODINGS, CaptionFile, read_caption_file
from library.dataset.collecting import collector_paused
from library.dataset.config import Size, is_file
from library.dataset.opened_folder import OpenedFolder
from library.dataset.picture_files import Decoded
from library.files import write_bytes_whole

NAME = ".athanor_index"
MAX_TEXT_BYTES = 8192  # of a caption; longer ones are read again each time

# The file: the head; the counts; a column for each letter of PICTURE, with a value for each picture; the same of
# CAPTION; all their names; the texts of the captions. The CRC-32 is of all that follows the head.
MAGIC = b"ATHANOR\x02"
HEAD = struct.Struct("<8sI")  # magic, CRC-32
COUNTS = struct.Struct("<IIQ")  # pictures, captions, bytes of the names
PICTURE = "IIBQIQqq"  # width, height, opaque, look, colour, content, bytes, time
CAPTION = "qqB"  # bytes, time, place of the encoding in ENCODINGS
BROKEN = (OSError, ValueError, IndexError, struct.error)


class FolderIndex:
    """The files of one folder as they are, and what is remembered of them."""

    def __init__(self, folder: Path):
        self.folder = folder
        with os.scandir(folder) as entries:
            self._unchecked = {entry.name: entry for entry in entries if is_file(entry)}
        self.names = list(self._unchecked)
        self.pictures: dict[str, Decoded] = {}
        self.captions: dict[str, CaptionFile] = {}
        self.has_changed = False
        with suppress(*BROKEN):
            if NAME in self._unchecked:
                pictures, captions = unpacked((folder / NAME).read_bytes())
                self.pictures = {name: row for name, row in pictures.items() if name in self._unchecked}
                self.captions = {name: row for name, row in captions.items() if name in self._unchecked}

    def picture(self, name: str) -> Decoded | None:
        """What a picture turned out to be when it was last decoded; None where it is new, has changed or is gone."""
        self._forget_if_changed(name, self.pictures)
        return self.pictures.get(name)

    def caption(self, name: str, opened: OpenedFolder) -> CaptionFile | None:
        """A caption file, read where it is new or has changed; what `read_caption_file` raises."""
        self._forget_if_changed(name, self.captions)
        if known := self.captions.get(name):
            return known
        file = opened.read(name, read_caption_file)
        if file and file.num_bytes <= MAX_TEXT_BYTES:
            self.captions[name] = file
            self.has_changed = True
        return file

    def _forget_if_changed(self, name: str, known: dict[str, Decoded] | dict[str, CaptionFile]) -> None:
        """Look at a file the first time that it is asked for, and let go of its status, which takes much memory."""
        entry, found = self._unchecked.pop(name, None), known.get(name)
        if entry is None or found is None:
            return
        try:
            status = entry.stat()
        except OSError:
            del known[name]
            return
        if status.st_size != found.num_bytes or status.st_mtime_ns != found.mtime_ns:
            del known[name]

    def note(self, name: str, decoded: Decoded) -> None:
        """Remember what a picture turned out to be."""
        if self.pictures.get(name) != decoded:
            self.pictures[name] = decoded
            self.has_changed = True

    def write(self) -> None:
        """Write what is known, where there is something new."""
        if not self.has_changed:
            return
        with suppress(OSError):
            write_bytes_whole(self.folder / NAME, packed(self.pictures, self.captions), durable=False)
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

    def size_of(self, file: str) -> Size | None:
        """The size of a picture that has not changed since it was decoded."""
        known = self._decoded(file)
        return known and known.size_wh

    @collector_paused()
    def known(self, files: Iterable[str]) -> dict[str, Decoded]:
        """What those of some pictures turned out to be that have not changed since they were decoded."""
        return {file: decoded for file in files if (decoded := self._decoded(file))}

    def note(self, file: str, decoded: Decoded) -> None:
        """Remember what a picture turned out to be."""
        self.folder(Path(file).parent).note(os.path.basename(file), decoded)

    def write(self) -> None:
        """Write the indexes that changed."""
        for folder in self._folders.values():
            folder.write()

    def _decoded(self, file: str) -> Decoded | None:
        folder, _, name = file.rpartition(os.sep)
        try:
            return (self._folders.get(folder) or self.folder(Path(file).parent)).picture(name)
        except OSError:
            return None


def packed(pictures: Mapping[str, Decoded], captions: Mapping[str, CaptionFile]) -> bytes:
    """The index as bytes."""
    picture_rows = [(*p.size_wh, p.is_opaque, *p[2:]) for p in pictures.values()]
    caption_rows = [(c.num_bytes, c.mtime_ns, ENCODINGS.index(c.encoding)) for c in captions.values()]
    names = "\0".join([*pictures, *captions]).encode("utf-8", "surrogateescape")
    texts = "\0".join(caption.text for caption in captions.values()).encode()
    counts = COUNTS.pack(len(pictures), len(captions), len(names))
    body = counts + _columns(picture_rows, PICTURE) + _columns(caption_rows, CAPTION) + names + texts
    return HEAD.pack(MAGIC, zlib.crc32(body)) + body


def unpacked(data: bytes) -> tuple[dict[str, Decoded], dict[str, CaptionFile]]:
    """Pictures and captions of an index; one of BROKEN where it is no index, or not a whole one."""
    magic, checksum = HEAD.unpack_from(data)
    body = memoryview(data)[HEAD.size :]
    if magic != MAGIC or zlib.crc32(body) != checksum:
        raise ValueError("not an index of this version")
    num_pictures, num_captions, num_name_bytes = COUNTS.unpack_from(body)
    (widths, heights, opaque, *more), place = _unpacked_columns(body, COUNTS.size, PICTURE, num_pictures)
    (*marks, encodings), place = _unpacked_columns(body, place, CAPTION, num_captions)
    names = _split(str(body[place : place + num_name_bytes], "utf-8", "surrogateescape"), num_pictures + num_captions)
    texts = _split(str(body[place + num_name_bytes :], "utf-8"), num_captions)
    if 0 in widths or 0 in heights:
        raise ValueError("a picture without a size")
    pictures = starmap(Decoded, zip(zip(widths, heights, strict=True), map(bool, opaque), *more, strict=True))
    captions = starmap(CaptionFile, zip(*marks, map(ENCODINGS.__getitem__, encodings), texts, strict=True))
    return (
        dict(zip(names[:num_pictures], pictures, strict=True)),
        dict(zip(names[num_pictures:], captions, strict=True)),
    )


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
