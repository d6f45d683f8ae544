"""What was found of the files of a folder, remembered in it, so that the next start reads only what has changed.

A file `.athanor_index` beside the pictures holds what each turned out to be when it was decoded, the texts of the
captions, and what the audit found. A file is the same where its name, its size in bytes and its time of change are.
Each start therefore asks for the status of every file that it knows, which with listing them is most of the work of a
second start: a folder's own time says nothing of files that were written in place, and neither do inode numbers. In
large folders several processes share it.

A file that changed less than UNCERTAIN_NS before it was read is not remembered: where a file system's clock is
coarse, it could change again and look the same. An index that is broken, of another version or impossible to write is
done without, and nothing is said: it only saves time.
"""

import hashlib
import os
import time
from array import array
from collections.abc import Collection, Iterable
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from library.dataset.caption_files import CaptionFile, captions_in, read_caption_file
from library.dataset.collecting import collector_paused
from library.dataset.config import Size, is_picture_name
from library.dataset.index_file import BROKEN, Remembered, StoredIndex, packed
from library.dataset.opened_folder import OpenedFolder
from library.dataset.other_processes import GONE, MAX_BYTES
from library.dataset.picture_files import Decoded
from library.files import write_bytes_whole

NAME = ".athanor_index"
NOTHING = StoredIndex(packed(Remembered({}, {})))
T = TypeVar("T")
UNCERTAIN_NS = 2 * 10**9  # the clock of FAT has steps of two seconds


class FolderIndex:
    """The files of one folder as they are, and what is remembered of those that have not changed."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._listed_ns = time.time_ns()
        self._stored = NOTHING
        with suppress(*BROKEN):
            self._stored = StoredIndex((folder / NAME).read_bytes())
        with OpenedFolder(folder) as opened:
            self.names, self._changed = opened.look(self._stored.names, self._stored.statuses)
            self.dangling = opened.dangling
        self._listing = digest_of(self.names)
        is_listed = self._stored.listing == self._listing
        self.picture_names = self._stored.picture_names if is_listed else sorted(filter(is_picture_name, self.names))
        self.audit = self._stored.audit
        self.is_as_stored = is_listed and not self._changed
        self.has_changed = bool(self._changed) or bool(self._stored.listing and not is_listed)

    @cached_property
    def pictures(self) -> dict[str, Decoded]:
        """What is known of the pictures that have not changed."""
        return without(self._stored.pictures, self._changed)

    @cached_property
    def captions(self) -> dict[str, CaptionFile]:
        """What is known of the captions that have not changed."""
        return without(self._stored.captions, self._changed)

    def sizes_of(self, pictures: list[str]) -> dict[str, Size]:
        """The sizes of those pictures that are known."""
        if self.is_as_stored and pictures is self.picture_names:
            return dict(zip(pictures, self._stored.sizes, strict=True))
        known = self.pictures
        return {name: known[name].size_wh for name in pictures if name in known}

    def texts_of(self, captions: list[str]) -> list[str] | None:
        """The texts of caption files, if just these were here before, none has changed, and no encoding is doubtful."""
        stored = self._stored
        if not self.is_as_stored or captions != stored.caption_names or "gbk" in stored.encodings:
            return None
        return stored.texts

    def caption(self, name: str, opened: OpenedFolder) -> CaptionFile | None:
        """A caption file, read where it is new or has changed; what `read_caption_file` raises."""
        if known := self.captions.get(name):
            return known
        file = opened.read(name, read_caption_file)
        if file and file.num_bytes <= MAX_BYTES:
            self.captions[name] = file
            self.has_changed = True
        return file

    def new_captions(self, names: Collection[str]) -> list[str]:
        """Those of some caption files that are to be read."""
        if self.texts_of(list(names)):
            return []
        return [name for name in names if name not in self.captions]

    def take(self, names: list[str], statuses: array, contents: bytes) -> None:
        """Caption files that another process has read, as far as it could."""
        sizes, files = statuses[::2], captions_in(contents, statuses[1::2])
        read = {name: file for name, size, file in zip(names, sizes, files, strict=True) if size != GONE and file}
        self.captions |= read
        self.has_changed |= bool(read)

    def note(self, name: str, decoded: Decoded) -> None:
        """Remember what a picture turned out to be."""
        if self.pictures.get(name) != decoded:
            self.pictures[name] = decoded
            self.has_changed = True

    def write(self) -> None:
        """Write what is known, where there is something new."""
        if not self.has_changed:
            return
        pictures = {name: file for name, file in sorted(self.pictures.items()) if self._is_certain(file)}
        captions = {name: file for name, file in sorted(self.captions.items()) if self._is_certain(file)}
        listing = self._listing if list(pictures) == self.picture_names else b""
        remembered = Remembered(pictures, captions, self.audit, listing)
        with suppress(OSError):
            write_bytes_whole(self.folder / NAME, packed(remembered), durable=False)
        self.has_changed = False

    def _is_certain(self, file: Decoded | CaptionFile) -> bool:
        """Whether a file that changes after it was read has another time of change."""
        return not self._listed_ns - UNCERTAIN_NS < file.mtime_ns < time.time_ns() + UNCERTAIN_NS


def without(files: dict[str, T], names: list[str]) -> dict[str, T]:
    """A copy of a mapping without some of its keys."""
    left = dict(files)
    for name in names:
        left.pop(name, None)
    return left


def digest_of(names: list[str]) -> bytes:
    """16 bytes that tell whether a folder lists the same names in the same order; the index itself is none."""
    listed = "\0".join([name for name in names if name != NAME])
    return hashlib.blake2b(listed.encode("utf-8", "surrogateescape"), digest_size=16).digest()


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
        known = self.known([file])
        return known[file].size_wh if known else None

    @collector_paused()
    def known(self, files: Iterable[str]) -> dict[str, Decoded]:
        """What those of some pictures turned out to be that have not changed since they were decoded."""
        known: dict[str, Decoded] = {}
        path, pictures = None, {}
        for file in files:
            folder, _, name = file.rpartition(os.sep)
            if folder != path:
                path, beside = folder, self._beside(file)
                pictures = beside.pictures if beside else {}
            if decoded := pictures.get(name):
                known[file] = decoded
        return known

    def note(self, file: str, decoded: Decoded) -> None:
        """Remember what a picture turned out to be."""
        self.folder(Path(file).parent).note(os.path.basename(file), decoded)

    def audit_of(self, file: str) -> bytes:
        """What is remembered of the audit of the dataset whose first picture this is."""
        return self._beside(file).audit if self._beside(file) else b""

    def note_audit(self, file: str, audit: bytes) -> None:
        """Remember the audit of the dataset whose first picture this is."""
        if folder := self._beside(file):
            folder.audit, folder.has_changed = audit, True

    def write(self) -> None:
        """Write the indexes that changed."""
        for folder in self._folders.values():
            folder.write()

    def _beside(self, file: str) -> FolderIndex | None:
        """The index of the folder that a file is in, where it can be listed."""
        try:
            return self.folder(Path(file).parent)
        except OSError:
            return None
