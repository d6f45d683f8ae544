"""Metadata files of the fine-tuning style, written as `library.dataset.metadata_file` reads them."""

import json
from pathlib import Path
from typing import Any

from library.dataset.metadata_file import Entry, read_entries
from library.errors import UserError
from library.files import write_text_whole

SUFFIXES = (".json", ".jsonl")


class Metadata:
    """The entries of one file, found by picture whichever way their keys are written."""

    def __init__(self, root: Path, entries: dict[str, Entry], full_path: bool):
        self.root, self.entries, self.full_path = root, entries, full_path

    def key_of(self, picture: Path) -> str:
        """The key that an entry of this picture has, or would get: its path, below the root where not in full.

        Other tools leave the extension out, or write the separators of Windows; their keys stay.
        """
        relative, absolute = picture.relative_to(self.root), picture.absolute()
        full, short = absolute.as_posix(), relative.as_posix()
        others = (str(absolute), str(relative), relative.with_suffix("").as_posix())
        own = full if self.full_path else short
        return next((key for key in (own, full, short, *others) if key in self.entries), own)

    def entry_of(self, picture: Path) -> Entry:
        """The entry of a picture, made where there is none."""
        return self.entries.setdefault(self.key_of(picture), {})


def read_metadata(path: Path | None, root: Path, full_path: bool) -> Metadata:
    """The metadata of a file, or of none."""
    return Metadata(root, read_entries(path) if path else {}, full_path)


def write_metadata(path: Path, entries: dict[str, Entry]) -> None:
    """Write an object by picture, or as .jsonl one object a line with its image_path."""
    if path.suffix.lower() == ".jsonl":
        lines = (_json({"image_path": key, **entry}) for key, entry in entries.items())
        write_text_whole(path, "".join(f"{line}\n" for line in lines))
    else:
        write_text_whole(path, _json(entries, indent=2) + "\n")


def suffix_problems(name: str, path: str | None) -> list[str]:
    """A sentence where a metadata file has no ending that says how it is written."""
    if path is None or Path(path).suffix.lower() in SUFFIXES:
        return []
    return [f"{name} must end in {' or '.join(SUFFIXES)}, got {path}"]


def _json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def source_of(in_json: str | None, out_json: str) -> Path | None:
    """The file whose entries are kept: the one given, or the one that is to be written where it is there already."""
    if in_json:
        return Path(in_json)
    return Path(out_json) if Path(out_json).is_file() else None


def json_problems(in_json: str | None, out_json: str, in_label: str) -> list[str]:
    """Sentences on the metadata files of a script."""
    problems = suffix_problems("out_json", out_json) + suffix_problems(in_label, in_json)
    if in_json and not Path(in_json).is_file():
        problems.append(f"{in_label}: there is no file {in_json}")
    if Path(out_json).is_dir():
        problems.append(f"out_json must be a file, but {out_json} is a folder")
    return problems


def require_any(num_found: int, extension: str, folder: Path) -> None:
    """UserError where no picture had a caption file."""
    if not num_found:
        raise UserError(f"--caption_extension: no picture in {folder} has a {extension} file")
