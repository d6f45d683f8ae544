"""A folder that is held open while many of its files are looked at, so that its path is not walked again for each."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol, TypeVar

from library.dataset.config import is_file

READING = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
T = TypeVar("T")


class KnownFile(Protocol):
    """What tells whether a file is still the same."""

    num_bytes: int
    mtime_ns: int


class OpenedFolder:
    """Lists a folder, and reads files by names in it, relative paths, or absolute ones; a context manager."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._handle: int | None = None
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
            files = [entry for entry in entries if is_file(entry)]
        if self._handle is None:
            self._entries = {entry.name: entry for entry in files}
        return [entry.name for entry in files]

    def changed(self, known: Iterable[tuple[str, KnownFile]]) -> list[str]:
        """Those files that are gone, or whose size or time of change is not what is known of them."""
        changed = []
        for name, file in known:
            try:
                status = os.stat(name, dir_fd=self._handle) if self._handle is not None else self._entries[name].stat()
                if status.st_size != file.num_bytes or status.st_mtime_ns != file.mtime_ns:
                    changed.append(name)
            except (OSError, KeyError):
                changed.append(name)
        return changed

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
