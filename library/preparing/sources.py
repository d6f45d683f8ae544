"""The pictures of a folder and the folders in it, with the files that belong to them."""

import logging
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from library.dataset.config import PICTURE_EXTENSIONS
from library.dataset.folder import as_compared
from library.errors import UserError, quoted_list

logger = logging.getLogger(__name__)

MORE_EXTENSIONS = (".gif", ".tif", ".tiff", ".jp2")  # which training does not take, but which become files that it does
EXTENSIONS = (*PICTURE_EXTENSIONS, *MORE_EXTENSIONS)
UNREAD_EXTENSIONS = (  # what cameras and phones write, named so that nobody wonders where they are
    *(".heic", ".heif", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2"),
    *(".psd", ".svg", ".mp4", ".mov"),
)
CACHE_EXTENSIONS = (".npz", ".safetensors")  # of pictures at the size that they had


@dataclass(frozen=True)
class Source:
    """One picture, and where it is inside the folder that was given."""

    path: Path
    inside: Path
    companions: tuple[str, ...] = ()  # files beside it with its name and another ending, captions above all

    @property
    def stem(self) -> str:
        return self.path.stem


def sources_in(folder: Path, label: str, left_out: Path | None = None) -> list[Source]:
    """The pictures of a folder and the folders in it, sorted; `label` names the flag in a UserError.

    `left_out` is a folder that is not looked into, where results go.
    """
    if not folder.is_dir():
        raise UserError(f"{label}: there is no folder {folder}")
    sources: list[Source] = []
    unread: Counter[str] = Counter()
    apart = left_out.resolve() if left_out else None
    for place, folders, names in os.walk(folder, onerror=_cannot_list):
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and (Path(place) / name).resolve() != apart
        )
        unread.update(ending for name in names if (ending := os.path.splitext(name)[1].lower()) in UNREAD_EXTENSIONS)
        sources += _of_folder(Path(place), Path(place).relative_to(folder), names)
    if unread:
        listed = quoted_list([f"{count} {ending}" for ending, count in sorted(unread.items())])
        logger.warning("%s: files that are not read are left out: %s; convert them to JPEG first", folder, listed)
    if not sources:
        raise UserError(f"{label}: there are no pictures in {folder}")
    return sources


def check_apart(source: Path, destination: Path, source_label: str, destination_label: str) -> list[str]:
    """A sentence where results would go to the pictures' own folder."""
    if source.resolve() == destination.resolve():
        return [f"{destination_label} must be another folder than {source_label}, got {destination} for both"]
    return []


def _cannot_list(error: OSError) -> None:
    raise UserError(f"{error.filename} cannot be read: {error.strerror}") from error


def _of_folder(folder: Path, inside: Path, names: Iterable[str]) -> list[Source]:
    names = sorted(name for name in names if not name.startswith("."))
    beside: dict[str, list[str]] = {}
    pictures = []
    for name in names:
        if name.lower().endswith(EXTENSIONS):
            if (folder / name).is_file():  # a pipe is none
                pictures.append(name)
        elif not name.lower().endswith(CACHE_EXTENSIONS):
            beside.setdefault(as_compared(os.path.splitext(name)[0]), []).append(name)
    return [
        Source(folder / name, inside / name, tuple(beside.get(as_compared(os.path.splitext(name)[0]), ())))
        for name in pictures
    ]
