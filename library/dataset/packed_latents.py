"""Latents in packs: a few large files in each folder of pictures, instead of an .npz for each picture.

To check them the indexes are read and each picture is asked for its status; the numbers are mapped into memory, and
compared with their checksum where they are first read. Packs are appended to by one process each, so that processes
and runs may write at once; of several entries of one name, the newest counts.
"""

import logging
import mmap
import os
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

from library.dataset.cache import CachedLatents, Origin
from library.dataset.cache_check import Finding, WantedLatents
from library.dataset.folder_packs import FolderPacks, doomed_packs, findings_of
from library.dataset.latent_pack import UNREADABLE, PackWriter, numbers_of, origin_of, read_entries, repair
from library.dataset.pack_files import NAME, new_pack, number_of, packs_in
from library.dataset.scan import ImageRecord
from library.errors import UserError
from library.leftovers import is_in_use

logger = logging.getLogger(__name__)

MAX_BYTES = 10**9  # of a pack that is still added to
MAX_MAPPED = 200  # packs in memory at once; each holds a file open


class PackedLatents:
    """The latents of one family, by the paths that their .npz files would have."""

    def __init__(self, family: str):
        self.family = family
        self._folders: dict[str, FolderPacks] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        self._writers: dict[str, PackWriter] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": {}}  # each process maps the files itself

    def place(self, record: ImageRecord) -> str:
        """The path that stands for the latents of a picture."""
        width, height = record.size_wh
        return f"{os.path.splitext(record.file)[0]}_{width:04d}x{height:04d}_{self.family}.npz"

    def clear_up(self, folders: Iterable[str]) -> None:
        """Have packs whose writers were killed keep their whole entries."""
        for path in chain.from_iterable(packs_in(folder, self.family) for folder in folders):
            with suppress(OSError):
                if not _is_whole(path) and not _is_written(path):
                    logger.info("%s: its writer was ended; %d of its latents are whole", path, repair(path))

    def has(self, place: str) -> bool:
        folder, name = os.path.split(place)
        packs = self._packs(folder)
        found = packs.place_of.get(name)
        return found is not None and bool(packs.entries.rows["numbers"][found])

    def examine(self, wanted: Sequence[tuple[str, WantedLatents]]) -> Iterator[Finding]:
        """Why the latents in places cannot be used, and their VAEs; their numbers are not read."""
        groups: dict[str, list[int]] = defaultdict(list)
        for number, (place, _) in enumerate(wanted):
            groups[os.path.dirname(place)].append(number)
        findings: list[Finding | None] = [None] * len(wanted)
        for folder, numbers in groups.items():
            names = [os.path.basename(wanted[number][0]) for number in numbers]
            found = findings_of(self._packs(folder), names, [wanted[number][1] for number in numbers])
            for number, finding in zip(numbers, found, strict=True):
                findings[number] = finding
        return iter(findings)

    def read(self, place: str) -> CachedLatents:
        """Latents; a UserError where they are missing or damaged, and then they are made anew at the next start."""
        folder, name = os.path.split(place)
        try:
            try:
                return self._read(self._packs(folder), name)
            except OSError:  # another run has put packs together
                del self._folders[folder]
                return self._read(self._packs(folder), name)
        except Damaged as error:
            self._note_damage(folder, name)
            raise UserError(f"cached latents {place} are damaged in {error}; train again to make them anew") from error
        except (*UNREADABLE, KeyError) as error:
            raise UserError(f"cached latents {place} are no longer in the packs of their folder ({error!r})") from error

    def read_with_origin(self, place: str) -> tuple[CachedLatents, Origin | None]:
        folder, name = os.path.split(place)
        packs = self._packs(folder)
        return self.read(place), origin_of(packs.entries, packs.place_of[name])

    def write(self, place: str, cached: CachedLatents, origin: Origin | None) -> None:
        """Add latents to a pack of this process; they are there to be read after `finish`."""
        folder, name = os.path.split(place)
        self._writer(folder).add(name, cached, origin)

    def finish(self) -> None:
        """Complete the packs that were written, and read those of all processes when they are next asked for."""
        self._folders.clear()
        for folder in list(self._writers):
            self._writers.pop(folder).finish()

    def tidy(self, folders: Iterable[str]) -> None:
        """Remove packs that hold nothing of use, and write anew what is left where half is useless, or in many."""
        for folder in folders:
            packs = self._packs(folder)
            doomed = doomed_packs(packs)
            kept = [name for name, place in packs.place_of.items() if packs.pack_of[place] in doomed]
            try:
                self._copy(packs, folder, kept)
            except (UserError, *UNREADABLE) as error:
                if unfinished := self._writers.pop(folder, None):
                    unfinished.path.unlink(missing_ok=True)
                logger.warning("packs of latents in %s keep what is no longer used: %s", folder, error)
                continue
            self._unmap()
            for number in doomed:
                with suppress(OSError):  # on Windows, while another run reads it
                    packs.paths[number].unlink()
        self._folders.clear()

    def _copy(self, packs: FolderPacks, folder: str, names: list[str]) -> None:
        for name in names:
            place = packs.place_of[name]
            try:
                cached = self._read(packs, name)
            except Damaged:
                self._writer(folder).add_useless(name)
            else:
                written_ns = int(packs.entries.rows["written_ns"][place])
                self._writer(folder).add(name, cached, origin_of(packs.entries, place), written_ns)
        if writer := self._writers.pop(folder, None):
            writer.finish()

    def _note_damage(self, folder: str, name: str) -> None:
        """Have the next start find out of a damaged entry, of which only reading it tells."""
        packs = self._packs(folder)
        if name not in packs.damaged:
            packs.damaged.add(name)
            with suppress(UserError):
                writer = self._new_writer(folder)
                writer.add_useless(name)
                writer.finish()

    def _packs(self, folder: str) -> FolderPacks:
        if folder not in self._folders:
            self._folders[folder] = FolderPacks(folder, self.family)
        return self._folders[folder]

    def _writer(self, folder: str) -> PackWriter:
        """What adds to the pack of a folder, or to another where that is full."""
        writer = self._writers.get(folder)
        if writer and writer.end >= MAX_BYTES:
            writer.finish()
        if not writer or writer.end >= MAX_BYTES:
            self._writers[folder] = self._new_writer(folder)
        return self._writers[folder]

    def _new_writer(self, folder: str) -> PackWriter:
        number = 1 + max((number_of(path.name) for path in packs_in(folder, self.family)), default=0)
        return PackWriter(new_pack(folder, self.family, number))

    def _read(self, packs: FolderPacks, name: str) -> CachedLatents:
        place = packs.place_of[name]
        row, path = packs.entries.rows[place], packs.paths[packs.pack_of[place]]
        start, num_bytes = int(row["numbers"]), int(row["num_bytes"])
        mapped = self._mapped(path)
        if not start or start + num_bytes > mapped.size():  # to read behind the end of a file would end the process
            raise Damaged(path)
        with memoryview(mapped) as whole, whole[start : start + num_bytes] as data:
            if not packs.is_proven[place]:
                if zlib.crc32(data) != row["checksum"]:
                    raise Damaged(path)
                packs.is_proven[place] = True
            latents, *others = numbers_of(row, data)
        flipped = others.pop(0) if row["mirrored"] else None
        width, height = row["size_wh"].tolist()
        return CachedLatents(
            latents, (width, height), tuple(row["crop_ltrb"].tolist()), flipped, others[0] if others else None
        )

    def _mapped(self, path: Path) -> mmap.mmap:
        if path not in self._maps:
            if len(self._maps) >= MAX_MAPPED:
                self._maps.pop(next(iter(self._maps))).close()
            with open(path, "rb") as file:
                self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._maps[path]

    def _unmap(self) -> None:
        while self._maps:
            self._maps.popitem()[1].close()


class Damaged(Exception):
    """Numbers that are not those that were written; the argument is their pack."""


def _is_written(path: Path) -> bool:
    """Whether the process that began a pack is still at it."""
    writer = NAME.fullmatch(path.name)
    return is_in_use(path, writer["machine"], int(writer["pid"]))


def _is_whole(path: Path) -> bool:
    try:
        read_entries(path)
    except UNREADABLE:
        return False
    return True
