"""The folders `<repeats>_<name>` of --train_data_dir and --reg_data_dir, and what is wrong where there are none."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from library.dataset.config import SUBSET_FLAGS, SubsetOptions, is_file, is_picture_name
from library.errors import UserError, quoted_list
from library.options.derived import caption_extension, face_crop_range
from library.texts import is_unicode


@dataclass(frozen=True)
class RepeatFolder:
    """A folder named <repeats>_<name>."""

    path: Path
    num_repeats: int
    class_tokens: str


@dataclass
class FolderListing:
    """What the sub-folders of a data folder say: pictures to take, mistakes, and things worth knowing."""

    folders: list[RepeatFolder] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def parse_repeat_folder(name: str) -> tuple[int, str] | None:
    """Repeats and class tokens of a folder name such as "10_yabin"; None where it does not begin with a number."""
    first, *rest = name.split("_")
    try:
        return int(first), "_".join(rest)
    except ValueError:
        return None


def subsets_from_folders(options: Any) -> list[SubsetOptions]:
    """The subsets of --train_data_dir and --reg_data_dir; mistakes in both are raised together."""
    train, reg = _listings(options)
    problems = train.problems + reg.problems
    if options.reg_data_dir and not problems and os.path.samefile(options.train_data_dir, options.reg_data_dir):
        problems.append(f"--reg_data_dir is the same folder as --train_data_dir: {options.reg_data_dir}")
    if problems:
        raise UserError(*problems)
    shared = {name: getattr(options, name) for name in SUBSET_FLAGS}
    masks = Path(options.conditioning_data_dir) if options.masked_loss and options.conditioning_data_dir else None
    return [
        SubsetOptions(
            image_dir=folder.path,
            num_repeats=folder.num_repeats,
            class_tokens=folder.class_tokens,
            is_reg=listing is reg,
            caption_extension=caption_extension(options),
            conditioning_data_dir=masks if listing is train else None,
            face_crop_aug_range=face_crop_range(options),
            **shared,
        )
        for listing in (train, reg)
        for folder in listing.folders
    ]


def folder_notes(options: Any) -> list[str]:
    """What in --train_data_dir and --reg_data_dir is left out, one sentence each."""
    train, reg = _listings(options)
    return train.notes + reg.notes


def list_repeat_folders(flag: str, data_dir: str | Path | None) -> FolderListing:
    """The <repeats>_<name> folders directly in data_dir, sorted by name."""
    if not data_dir:
        return FolderListing(problems=[f"{flag} is missing: give the folder that holds folders such as 10_yabin"])
    root = Path(data_dir)
    if root.is_file():
        return FolderListing(problems=[f"{flag} must be a folder, but {root} is a file"])
    if not root.is_dir():
        return FolderListing(problems=[f"{flag}: there is no folder {root}"])
    try:
        return _classify(flag, root)
    except PermissionError as error:
        return FolderListing(problems=[f"{flag}: no permission to read {error.filename or root}"])


def _listings(options: Any) -> tuple[FolderListing, FolderListing]:
    train = list_repeat_folders("--train_data_dir", options.train_data_dir)
    reg = list_repeat_folders("--reg_data_dir", options.reg_data_dir) if options.reg_data_dir else FolderListing()
    return train, reg


def _classify(flag: str, root: Path) -> FolderListing:
    listing = FolderListing()
    unnumbered: list[Path] = []
    for folder in _sub_folders(root):
        parsed = parse_repeat_folder(folder.name)
        if not is_unicode(folder.name):
            listing.problems.append(f"{flag}: the name of {folder} is not in UTF-8; rename it")
        elif parsed is None:
            unnumbered.append(folder)
        elif parsed[0] < 1:
            listing.notes.append(f"{folder} is left out: its number of repeats, {parsed[0]}, is below 1")
        else:
            listing.folders.append(RepeatFolder(folder, *parsed))
    if listing.folders:
        listing.notes += _left_out(root, unnumbered)
    elif not listing.problems:
        listing.problems.append(f"{flag}: {_why_nothing_found(root, unnumbered, listing.notes)}")
    return listing


def _left_out(root: Path, unnumbered: list[Path]) -> list[str]:
    notes = [
        f"{folder} is left out: its name does not begin with a number of repeats, as 10_{folder.name} would"
        for folder in unnumbered
    ]
    if num_pictures := _num_pictures(root):
        notes.append(f"pictures directly in {root} ({num_pictures}) are left out: only those in its folders count")
    return notes


def _why_nothing_found(root: Path, unnumbered: list[Path], notes: list[str]) -> str:
    """The most likely mistake behind a data folder without any <repeats>_<name> folder, and what would be right."""
    if _num_pictures(root):
        if parse_repeat_folder(root.resolve().name):
            return f"{root} is itself a folder of pictures; use its parent {root.resolve().parent}"
        return (
            f"the pictures lie directly in {root}; move them to a folder in it whose name begins with the number "
            f"of repeats, such as {root / f'10_{root.resolve().name}'}"
        )
    if deeper := [folder for folder in unnumbered if _has_repeat_folders(folder)]:
        return f"{root} has no folders such as 10_yabin, but {deeper[0]} has: did you mean {deeper[0]}?"
    if with_pictures := [folder for folder in unnumbered if _num_pictures(folder)]:
        first = with_pictures[0]
        return (
            f"no folder in {root} begins with a number of repeats; "
            f"rename {quoted_list([folder.name for folder in with_pictures])} to e.g. 10_{first.name}"
        )
    if notes:
        return "; ".join(notes)
    if unnumbered:
        return f"there are no pictures in {root}, only the folders {quoted_list([f.name for f in unnumbered])}"
    return f"{root} is empty; it should hold folders of pictures such as 10_yabin"


def _sub_folders(root: Path) -> list[Path]:
    with os.scandir(root) as entries:
        names = [entry.name for entry in entries if not entry.name.startswith(".") and os.path.isdir(entry)]
    return [root / name for name in sorted(names)]


def _has_repeat_folders(root: Path) -> bool:
    parsed = [(parse_repeat_folder(folder.name), folder) for folder in _sub_folders(root)]
    return any(pair and pair[0] >= 1 and _num_pictures(folder) for pair, folder in parsed)


def _num_pictures(root: Path) -> int:
    with os.scandir(root) as entries:
        return sum(is_picture_name(entry.name) and is_file(entry) for entry in entries)
