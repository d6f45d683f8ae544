"""The pictures of a folder and where their captions lie. Needs no numpy."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from library.dataset.caption_files import MAX_CAPTION_BYTES, CaptionFile, TooLarge, as_neighbours, read_caption_file
from library.dataset.config import is_file, is_picture_name
from library.dataset.opened_folder import READING
from library.errors import UserError
from library.texts import is_unicode


def find_pictures(folder: Path, recursive: bool) -> list[Path]:
    """The pictures of a folder, with `recursive` those of its folders too, sorted; a UserError where there are none."""
    found = sorted(_walk(folder, recursive, set()))
    if bad := [path for path in found if not is_unicode(str(path))]:
        raise UserError(f"train_data_dir: the name of {bad[0]} is not in UTF-8; rename it")
    if not found:
        advice = "" if recursive else "; --recursive looks into its folders too"
        raise UserError(f"train_data_dir: there are no pictures in {folder}{advice}")
    return found


def _walk(folder: Path, recursive: bool, seen: set[str]) -> Iterator[Path]:
    if (real := os.path.realpath(folder)) in seen:  # by a link in a circle
        return
    seen.add(real)
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if is_picture_name(entry.name) and is_file(entry):
                    yield folder / entry.name
                elif recursive and not entry.name.startswith(".") and os.path.isdir(entry):
                    yield from _walk(folder / entry.name, recursive, seen)
    except OSError as error:
        raise UserError(f"train_data_dir: {folder} cannot be read: {error.strerror}") from error


def caption_path(picture: Path, extension: str) -> Path:
    """The caption file of a picture."""
    return picture.with_name(picture.stem + extension)


def read_captions(paths: Iterable[Path]) -> dict[Path, str]:
    """The texts of caption files in any encoding that training reads, without blanks at their ends."""
    files = {path: _read(path) for path in paths}
    return {path: file.text.strip() for path, file in zip(files, as_neighbours(list(files.values())), strict=True)}


def _read(path: Path) -> CaptionFile:
    try:
        handle = os.open(path, READING)
        try:
            file = read_caption_file(handle)
        finally:
            os.close(handle)
    except TooLarge:
        raise UserError(f"{path} is no caption: it is larger than {MAX_CAPTION_BYTES // 10**6} MB") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if file is None:
        raise UserError(f"{path} is neither UTF-8, UTF-16 with a mark at its start, nor GBK; save it as UTF-8")
    return file


def folder_problems(folder: str) -> list[str]:
    """A sentence where a positional train_data_dir is not a folder."""
    return [] if Path(folder).is_dir() else [f"train_data_dir: there is no folder {folder}"]
