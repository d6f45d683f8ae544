"""A folder that is held open while many of its files are looked at, so that its path is not walked again for each."""

import os
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from library.dataset.config import is_file
from library.dataset.other_processes import GONE, OtherProcess, shares, statuses

READING = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
LISTING = 0.25  # of the time that it takes to look at what is listed
T = TypeVar("T")


class OpenedFolder:
    """Lists a folder, and reads files by names in it, relative paths, or absolute ones; a context manager."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._handle: int | None = None
        self.dangling: list[str] = []  # links that lead nowhere, as `names` finds them
        self._entries: dict[str, os.DirEntry] = {}  # on Windows, where they know the status of their files

    def __enter__(self) -> "OpenedFolder":
        if os.open in os.supports_dir_fd:  # not on Windows
            self._handle = os.open(self._folder, READING)
        return self

    def __exit__(self, *_: object) -> None:
        if self._handle is not None:
            os.close(self._handle)

    def names(self) -> list[str]:
        """The names of its files, in no order."""
        with os.scandir(self._folder if self._handle is None else self._handle) as entries:
            everything = list(entries)
        try:
            files = [entry for entry in everything if entry.is_file()]
        except OSError:
            files = [entry for entry in everything if is_file(entry)]
        others = [entry for entry in everything if not is_file(entry)] if len(files) < len(everything) else []
        self.dangling = sorted(entry.name for entry in others if entry.is_symlink() and not self._is_there(entry.name))
        if self._handle is None:
            self._entries = {entry.name: entry for entry in files}
        return [entry.name for entry in files]

    def _is_there(self, name: str) -> bool:
        try:
            os.stat(self._folder / name)
        except OSError:
            return False
        return True

    def look(self, known: list[str], known_statuses: array) -> tuple[list[str], list[str]]:
        """The names of its files, in no order, and those of `known` that are gone or have another status.

        A status is the bytes of a file and its time of change in ns, as in `other_processes.statuses`.
        """
        mine, *others = shares(known, len(known) * LISTING)
        processes = [OtherProcess(str(self._folder), share) for share in others]
        names = self.names()
        found = self._statuses(mine)
        for share, process in zip(others, processes, strict=True):
            looked = process.found()
            found += looked[0] if looked else self._statuses(share)
        if found == known_statuses:
            return names, []
        pairs = [(found[place : place + 2], known_statuses[place : place + 2]) for place in range(0, len(found), 2)]
        return names, [name for name, (now, before) in zip(known, pairs, strict=True) if now != before]

    def _statuses(self, names: list[str]) -> array:
        if self._handle is not None:
            return statuses(names, self._handle)
        found = array("q")
        for name in names:
            try:
                status = self._entries[name].stat()
                found.extend((status.st_size, status.st_mtime_ns))
            except (OSError, KeyError):
                found.extend((GONE, GONE))
        return found

    def read(self, name: str, reader: Callable[[int], T]) -> T:
        """What `reader` makes of the handle of a file."""
        if self._handle is None:
            handle = os.open(self._folder / name, READING)
        else:
            handle = os.open(name, READING, dir_fd=self._handle)
        try:
            return reader(handle)
        finally:
            os.close(handle)
