"""What was found of the files of a folder, remembered in it, so that the next start reads only what has changed.

A file `.athanor_index` beside the pictures holds what each turned out to be when it was decoded, the texts of the
captions, and what the audit found. A file is the same where its name, its size in bytes and its time of change are.
Each start therefore asks for the status of every file that it knows, which with listing them is half of the time of a
second start: a folder's own time says nothing of files that were written in place, and neither do inode numbers.
Threads do not help: the calls are so short that handing the interpreter over costs more than they do.

A file that changed less than UNCERTAIN_NS before it was read is not remembered: where a file system's clock is
coarse, it could change again and look the same. An index that is broken, of another version or impossible to write is
done without, and nothing is said: it only saves time.
"""

import hashlib
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from itertools import chain
from pathlib import Path

from library.dataset.caption_files import CaptionFile, read_caption_file
from library.dataset.collecting import collector_paused
from library.dataset.config import Size, is_picture_name
from library.dataset.index_file import BROKEN, Remembered, packed, unpacked
from library.dataset.opened_folder import OpenedFolder
from library.dataset.picture_files import Decoded
from library.files import write_bytes_whole

NAME = ".athanor_index"
MAX_TEXT_BYTES = 8192  # of a caption; longer ones are read again each time
UNCERTAIN_NS = 2 * 10**9  # the clock of FAT has steps of two seconds


class FolderIndex:
    """The files of one folder as they are, and what is remembered of those that have not changed."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._listed_ns = time.time_ns()
        known = Remembered({}, {})
        with suppress(*BROKEN):
            known = unpacked((folder / NAME).read_bytes())
        with OpenedFolder(folder) as opened:
            self.names = opened.names()
            changed = opened.changed(chain(known.pictures.items(), known.captions.items()))
        self._listing = digest_of(self.names)
        is_listed = known.listing == self._listing
        self.picture_names = list(known.pictures) if is_listed else sorted(filter(is_picture_name, self.names))
        self.pictures, self.captions, self.audit = dict(known.pictures), dict(known.captions), known.audit
        for name in changed:
            self.pictures.pop(name, None)
            self.captions.pop(name, None)
        self.has_changed = bool(changed) or bool(known.listing and not is_listed)

    def caption(self, name: str, opened: OpenedFolder) -> CaptionFile | None:
        """A caption file, read where it is new or has changed; what `read_caption_file` raises."""
        if known := self.captions.get(name):
            return known
        file = opened.read(name, read_caption_file)
        if file and file.num_bytes <= MAX_TEXT_BYTES:
            self.captions[name] = file
            self.has_changed = True
        return file

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
