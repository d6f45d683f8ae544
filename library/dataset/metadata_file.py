"""Subsets of the fine-tuning style: pictures named by a JSON file, with captions, tags and sizes.

The file is an object {picture: {"caption", "tags", "image_size"}}, or JSON lines, each with its "image_path".
"""

import json
import os
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from library.dataset.config import SUBSET_FLAGS, Size, SubsetOptions, is_file, is_picture_name
from library.dataset.folder import Folder
from library.dataset.pack_files import packed_names
from library.errors import UserError, counted, quoted_list
from library.files import read_user_text
from library.options.derived import face_crop_range
from library.texts import read_json

LATENTS_NAME = re.compile(r"(.+)_(\d{4,})x(\d{4,})_sd\.npz")  # as library.dataset.cache names them

# what is told of entries that do not simply name a picture
ABSENT = "name no picture and are left out"
AMBIGUOUS = "fit several pictures and are left out; add the extension"
DOUBLED = "name a picture that another one names, and are left out"
LATENTS_TRAINED = "name pictures that are gone; their latents on disk are trained"
LATENTS_LEFT = (
    "name pictures that are gone, and are left out; --cache_latents_to_disk would train their latents on disk"
)
SILENT = "have neither caption nor tags; their caption is empty"

Entry = dict[str, Any]


def subset_of_in_json(options: Any) -> SubsetOptions:
    """The one subset of --in_json, with its pictures in --train_data_dir."""
    image_dir = Path(options.train_data_dir) if options.train_data_dir else None
    if image_dir and not image_dir.is_dir():
        raise UserError(f"--train_data_dir: there is no folder {image_dir}")
    return SubsetOptions(
        image_dir=image_dir,
        metadata_file=Path(options.in_json),
        num_repeats=options.dataset_repeats,
        face_crop_aug_range=face_crop_range(options),
        **{name: getattr(options, name) for name in SUBSET_FLAGS if name != "cache_info"},
    )


def read_metadata_file(subset: SubsetOptions, latents_suffice: bool = False) -> Folder:
    """The pictures and captions of a metadata file; mistakes are in `problems`.

    With latents_suffice, a picture that is gone counts where its latents are on disk.
    """
    try:
        return _matched(subset, read_entries(subset.metadata_file), latents_suffice)
    except UserError as error:
        return Folder(subset, problems=error.problems)


def read_entries(path: Path) -> dict[str, Entry]:
    """Key -> what the file says of it; a UserError names the place of what is damaged."""
    text = read_user_text(path, str(path))
    entries = dict(_lines(path, text)) if path.suffix.lower() == ".jsonl" else _parsed(path, text)
    if not isinstance(entries, dict) or not entries:
        raise UserError(f'{path} names no pictures; it should hold {{"picture.png": {{"caption": "..."}}}} and so on')
    if faults := [f"{key} {fault}" for key, entry in entries.items() if (fault := _fault(entry))]:
        raise UserError(f"{path}: {quoted_list(faults, limit=3)}")
    return entries


def combined_caption(entry: Entry, subset: SubsetOptions) -> str:
    """Caption and tags in one; with wildcards every line of the caption, each with the tags behind it."""
    separator = subset.caption_separator
    lines = _filled_lines(entry.get("caption"))
    if not subset.enable_wildcard:
        lines = lines[:1]
    tags = separator.join(_filled_lines(entry.get("tags")))
    return "\n".join(f"{line}{separator}{tags}" if tags else line for line in lines) or tags


class Listing:
    """The pictures of one folder and the latents on its disk, listed once, and which pictures were named."""

    def __init__(self, folder: str):
        self.pictures: dict[str, str] = {}  # normalised name -> name
        self.by_stem: dict[str, list[str]] = defaultdict(list)
        self.named: set[str] = set()
        names = _file_names(folder)
        for name in names:
            if is_picture_name(name):
                self.pictures[os.path.normcase(name)] = name
                self.by_stem[os.path.normcase(os.path.splitext(name)[0])].append(name)
        self.latents: dict[str, list[Size]] = defaultdict(list)  # stem -> sizes of the pictures
        for match in map(LATENTS_NAME.fullmatch, {*names, *packed_names(names, folder, "sd")}):
            if match:
                self.latents[match[1]].append((int(match[2]), int(match[3])))

    def find(self, name: str) -> list[str]:
        """The picture of this name; otherwise those that have it without their extension."""
        normalised = os.path.normcase(name)
        exact = self.pictures.get(normalised)
        return self.by_stem.get(normalised, []) if exact is None else [exact]

    def size_of_latents(self, name: str, size_wh: Size | None) -> Size | None:
        """The size of the picture, now gone, that the one fitting file of latents was made of."""
        stem = os.path.splitext(name)[0] if is_picture_name(name) else name
        fitting = [size for size in self.latents.get(stem, []) if size_wh in (None, size)]
        return fitting[0] if len(fitting) == 1 else None

    def num_unnamed(self) -> int:
        return len(set(self.pictures.values()) - self.named)


def _matched(subset: SubsetOptions, entries: dict[str, Entry], latents_suffice: bool) -> Folder:
    """The pictures that the entries mean, with notes on what does not match."""
    folder, listings, remarks = Folder(subset), {}, defaultdict(list)
    for key, entry in entries.items():
        directory, name = os.path.split(key)
        path = _directory(subset, key, directory)
        if path not in listings:
            listings[path] = Listing(path)
        size_wh = tuple(entry["image_size"]) if entry.get("image_size") else None
        found, size_wh, remark = _meant(listings[path], name, size_wh, latents_suffice)
        if remark:
            remarks[remark].append(key)
        if found is None:
            continue
        picture = os.path.join(directory, found)
        folder.pictures.append(picture)
        if remark == LATENTS_TRAINED:
            folder.gone.add(picture)
        if size_wh:
            folder.sizes[picture] = size_wh
        if caption := combined_caption(entry, subset):
            folder.captions[picture] = caption
        else:
            remarks[SILENT].append(key)
    if not folder.pictures:
        sentences = "; ".join(_remark_sentences(remarks, len(entries)))
        raise UserError(
            f"{subset.metadata_file} names no pictures of {subset.image_dir or 'this computer'}: {sentences}"
        )
    folder.notes.extend(f"{subset.metadata_file}: {text}" for text in _remark_sentences(remarks, len(entries)))
    folder.notes.extend(
        f"{counted(count, 'picture')} in {path} left out: not in {subset.metadata_file}"
        for path, listing in listings.items()
        if (count := listing.num_unnamed())
    )
    return folder


def _meant(
    listing: Listing, name: str, size_wh: Size | None, latents_suffice: bool
) -> tuple[str | None, Size | None, str | None]:
    """The picture that a key's name means, its size where known, and a remark where there is one to make."""
    found, remark = listing.find(name), None
    if not found and (latents_wh := listing.size_of_latents(name, size_wh)):
        if not latents_suffice:
            return None, None, LATENTS_LEFT
        found, size_wh, remark = [name if is_picture_name(name) else f"{name}.png"], latents_wh, LATENTS_TRAINED
    if len(found) != 1:
        return None, None, AMBIGUOUS if found else ABSENT
    if found[0] in listing.named:
        return None, None, DOUBLED
    listing.named.add(found[0])
    return found[0], size_wh, remark


def _directory(subset: SubsetOptions, key: str, directory: str) -> str:
    if subset.image_dir is None and not os.path.isabs(directory):
        raise UserError(
            f"{subset.metadata_file}: {key} is not an absolute path, so the subset needs an image_dir "
            "(with --in_json a --train_data_dir)"
        )
    return os.path.abspath(os.path.join(subset.image_dir or "", directory))


def _file_names(folder: str) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if is_file(entry))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}") from error


def _remark_sentences(remarks: dict[str, list[str]], total: int) -> list[str]:
    return [
        f"{len(keys)} of {total} entries {remark} ({quoted_list(keys, limit=3)})" for remark, keys in remarks.items()
    ]


def _lines(path: Path, text: str) -> Iterator[tuple[str, Entry]]:
    """The entries of a file of JSON lines."""
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        entry = _parsed(path, line, number)
        key = entry.get("image_path") if isinstance(entry, dict) else None
        if not isinstance(key, str):
            raise UserError(f"{path}:{number}: the line has no image_path, the path of the picture")
        yield key, entry


def _parsed(path: Path, text: str, first_line: int = 1) -> Any:
    try:
        return read_json(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise UserError(f"{path}:{line}: not JSON: {error.msg} at column {error.colno}") from error


def _fault(entry: Any) -> str | None:
    """What is wrong with an entry."""
    if not isinstance(entry, dict):
        return f"must have an object with caption or tags, got {entry!r:.40}"
    for name in ("caption", "tags"):
        if not isinstance(entry.get(name), str | None):
            return f"has a {name} that is not text: {entry[name]!r:.40}"
    size = entry.get("image_size")
    if not size or (isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)):
        return None
    return f"has an image_size that is not [width, height]: {size!r:.40}"


def _filled_lines(text: str | None) -> list[str]:
    return [line.strip() for line in (text or "").splitlines() if line.strip()]
