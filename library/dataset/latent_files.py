"""Latents on disk, whatever files they are in; and kohya's, an .npz for each picture."""

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from library.dataset import cache
from library.dataset.array_files import KnownArrays
from library.dataset.cache import CachedLatents, Origin, latents_path, read_latents, read_with_origin, write_latents
from library.dataset.cache_check import Finding, WantedLatents, examine
from library.dataset.scan import ImageRecord
from library.leftovers import remove_leftovers

NUM_READERS = 8  # threads that examine files, which wait for the disk


class LatentFiles(Protocol):
    """Latents by places: paths, under which they need not lie."""

    def place(self, record: ImageRecord) -> str:
        """The place of a picture's latents."""

    def clear_up(self, folders: Iterable[str]) -> None:
        """Make good what killed runs left in folders of pictures; for one process."""

    def has(self, place: str) -> bool:
        """Whether there are latents in a place, whatever they are."""

    def examine(self, wanted: Sequence[tuple[str, WantedLatents]]) -> Iterator[Finding]:
        """Compare what is in places with what is wanted there."""

    def read(self, place: str) -> CachedLatents:
        """Latents; a UserError where they are missing or damaged."""

    def read_with_origin(self, place: str) -> tuple[CachedLatents, Origin | None]:
        """Latents that were examined, and what they were made from."""

    def write(self, place: str, cached: CachedLatents, origin: Origin | None) -> None:
        """Keep latents; a UserError where they cannot be written."""

    def finish(self) -> None:
        """Have all that was written there to be read, by every process."""

    def tidy(self, folders: Iterable[str]) -> None:
        """Give back room on the disk after writing; for one process, when all have finished."""


class NpzLatents:
    """Kohya's files of one family."""

    def __init__(self, family: str = "sd"):
        self.family = family
        self._known = KnownArrays(cache.KEYS)

    def place(self, record: ImageRecord) -> str:
        return os.fspath(latents_path(record.file, record.size_wh, self.family))

    def clear_up(self, folders: Iterable[str]) -> None:
        remove_leftovers(map(Path, folders))

    def has(self, place: str) -> bool:
        return os.path.isfile(place)

    def examine(self, wanted: Sequence[tuple[str, WantedLatents]]) -> Iterator[Finding]:
        with ThreadPoolExecutor(NUM_READERS) as pool:
            yield from pool.map(lambda item: examine(Path(item[0]), item[1]), wanted)

    def read(self, place: str) -> CachedLatents:
        return read_latents(place, self._known)

    def read_with_origin(self, place: str) -> tuple[CachedLatents, Origin | None]:
        return read_with_origin(place)

    def write(self, place: str, cached: CachedLatents, origin: Origin | None) -> None:
        write_latents(place, cached, origin)

    def finish(self) -> None: ...

    def tidy(self, folders: Iterable[str]) -> None: ...
