"""A folder that is held open while many of its files are read, so that its path is not walked again for each."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

READING = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
T = TypeVar("T")


class OpenedFolder:
    """Reads files by their names in the folder, relative paths, or absolute ones; a context manager."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._handle: int | None = None

    def __enter__(self) -> "OpenedFolder":
        if os.open in os.supports_dir_fd:  # not on Windows
            self._handle = os.open(self._folder, READING)
        return self

    def __exit__(self, *_: object) -> None:
        if self._handle is not None:
            os.close(self._handle)

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
