"""The pictures and captions of one folder, found by name and read once."""

import importlib
import os
from collections import Counter
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image, features

from library.dataset.caption_files import MAX_CAPTION_BYTES, TooLarge, as_neighbours, captions_of
from library.dataset.config import PICTURE_EXTENSIONS, Size, SubsetOptions, is_file, is_picture_name
from library.dataset.info_cache import read_sizes
from library.dataset.opened_folder import OpenedFolder
from library.dataset.other_processes import OtherProcess, shares
from library.dataset.picture_files import plain_size
from library.dataset.picture_index import FolderIndex, PictureIndex
from library.errors import quoted_list

for _plugin in ("pillow_avif", "pillow_jxl"):  # they register themselves with Pillow
    with suppress(ImportError):
        importlib.import_module(_plugin)

PICTURE = 0.75  # of the time that reading a caption takes
CAPTION_EXTENSIONS = (".txt", ".caption")  # looked for where the configured one is nowhere in a folder


as_compared = os.path.normcase if os.name == "nt" else str  # on Windows a.TXT is a.txt


@dataclass(frozen=True)
class Folder:
    """The pictures of one subset and their captions."""

    subset: SubsetOptions  # with the caption extension that is really there
    pictures: list[str] = field(default_factory=list)  # sorted file names, or paths as a metadata file has them
    captions: dict[str, str] = field(default_factory=dict)  # picture -> caption, for those that have one
    masks: dict[str, Path] = field(default_factory=dict)  # picture -> mask, where the subset has masks
    sizes: dict[str, Size] = field(default_factory=dict)  # picture -> size, where it is noted somewhere
    gone: set[str] = field(default_factory=set)  # pictures of which only the latents are on disk
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def files(self) -> list[str]:
        """The path of each picture."""
        folder = self.subset.image_dir or Path()
        if self.subset.metadata_file:
            return [str(folder / picture) for picture in self.pictures]
        prefix = str(folder / "x")[:-1]
        return [prefix + picture for picture in self.pictures]


def read_folder(subset: SubsetOptions, index: PictureIndex) -> Folder:
    """List a subset's folder once and read its captions and sizes; what cannot be read is in `problems`.

    Sizes are missing of pictures that have no plain header.
    """
    try:
        files = index.folder(subset.image_dir)
        with OpenedFolder(subset.image_dir) as opened:
            return _read_folder(subset, files, opened)
    except OSError as error:
        return Folder(subset, problems=[f"{subset.image_dir} cannot be read: {error.strerror}"])


def _read_folder(subset: SubsetOptions, files: FolderIndex, opened: OpenedFolder) -> Folder:
    pictures, notes = _pictures(subset, files.picture_names)
    stems = list(map(stem_of, pictures))
    notes += _doubled(subset, stems)
    if links := list(filter(is_picture_name, files.dangling)):
        notes.append(f"links in {subset.image_dir} that lead to no picture are left out: {quoted_list(links, limit=3)}")
    subset, caption_files, more_notes = _find_captions(subset, pictures, stems, files)
    sizes, size_notes = read_sizes(subset.image_dir) if subset.cache_info else ({}, [])
    sizes |= files.sizes_of(pictures)
    unknown = [name for name in pictures if name not in sizes]
    _, *others = shares(files.new_captions(caption_files.values()), len(unknown) * PICTURE)
    processes = [(share, OtherProcess(str(subset.image_dir), share, reads=True)) for share in others]
    for name in unknown:
        with suppress(OSError):
            sizes[name] = opened.read(name, plain_size)
    for share, process in processes:
        if found := process.found():
            files.take(share, *found)
    captions, yet_more_notes, problems = _read_captions(subset, caption_files, files, opened)
    masks, mask_problems = _find_masks(subset, pictures)
    notes += more_notes + yet_more_notes + size_notes
    return Folder(subset, pictures, captions, masks, sizes, notes=notes, problems=problems + mask_problems)


def _pictures(subset: SubsetOptions, found: list[str]) -> tuple[list[str], list[str]]:
    """Those of the pictures of a folder that can be read, and notes."""
    unreadable = tuple(extension for extension in PICTURE_EXTENSIONS if not _pillow_reads(extension))
    everything = "\0".join(found).lower()
    may_be_there = any(extension in everything for extension in unreadable)
    left_out = [name for name in found if name.lower().endswith(unreadable)] if may_be_there else []
    pictures = [name for name in found if not name.lower().endswith(unreadable)] if left_out else found
    notes = []
    if left_out:
        listed = quoted_list(left_out, limit=3)
        notes.append(f"pictures in {subset.image_dir} that this Pillow cannot read are left out: {listed}")
    if not pictures:
        notes.append(f"there are no pictures in {subset.image_dir}")
    return pictures, notes


def _doubled(subset: SubsetOptions, stems: list[str]) -> list[str]:
    """A note on pictures that differ in extension alone."""
    if len(set(stems)) == len(stems):
        return []
    doubled = [stem for stem, count in Counter(stems).items() if count > 1]
    listed = quoted_list(doubled, limit=3)
    return [f"pictures in {subset.image_dir} share caption and cache file, differing in extension: {listed}"]


def _find_masks(subset: SubsetOptions, pictures: list[str]) -> tuple[dict[str, Path], list[str]]:
    """Picture -> mask of the same name without extension, and problems: every picture needs one."""
    folder = subset.conditioning_data_dir
    if folder is None:
        return {}, []
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if is_file(entry) and is_picture_name(entry.name))
    except OSError as error:
        return {}, [f"conditioning_data_dir: {folder} cannot be read: {error.strerror}"]
    by_stem = {os.path.splitext(name)[0]: folder / name for name in reversed(names)}
    masks = {picture: by_stem.get(os.path.splitext(picture)[0]) for picture in pictures}
    if missing := [picture for picture, mask in masks.items() if mask is None]:
        return {}, [f"{folder} has no mask for {quoted_list(missing)} of {subset.image_dir}"]
    return masks, []


def _find_captions(
    subset: SubsetOptions, pictures: list[str], stems: list[str], index: FolderIndex
) -> tuple[SubsetOptions, dict[str, str], list[str]]:
    """The subset with the extension to take, picture -> caption file, and notes on what is missing."""
    own = [stem + subset.caption_extension for stem in stems]
    names = index.names
    if index.texts_of(own) or set(own).issubset(names):
        return subset, dict(zip(pictures, own, strict=True)), []
    files = _caption_files(pictures, names, subset.caption_extension)
    if len(files) == len(pictures):
        return subset, files, []
    coverage = f"{len(files)} of {len(pictures)} pictures in {subset.image_dir} have {subset.caption_extension} files"
    if not files:
        others = {extension: _caption_files(pictures, names, extension) for extension in CAPTION_EXTENSIONS}
        best = max(others, key=lambda extension: len(others[extension]))
        if files := others[best]:
            subset = replace(subset, caption_extension=best)
            coverage += f", {len(files)} have {best}: taking {best}"
    if len(files) < len(pictures):
        coverage += f"; {'the others' if files else 'all'} get {_fallback(subset)}"
    return subset, files, [coverage]


def _caption_files(pictures: list[str], names: Collection[str], extension: str) -> dict[str, str]:
    """Picture -> caption file, for those that have one."""
    ending = as_compared(extension)
    keys = names if as_compared is str else list(map(as_compared, names))
    files = {key: name for key, name in zip(keys, names, strict=True) if key.endswith(ending)}
    if not files:
        return {}
    own = [as_compared(picture[: picture.rindex(".")] + extension) for picture in pictures]
    found = {picture: files[key] for picture, key in zip(pictures, own, strict=True) if key in files}
    for picture in pictures if len(found) < len(pictures) else []:
        key = as_compared(caption_names(picture, extension)[-1])
        if picture not in found and key in files:
            found[picture] = files[key]
    return found


def caption_names(picture: str, extension: str) -> tuple[str, ...]:
    """Where a picture's caption may be; x_<left>_<top>_<width>_<height>.png, a face cut out, may use that of x."""
    stem = stem_of(picture)
    whole_picture = stem.rsplit("_", 4)[0] if stem.count("_") >= 4 else ""
    return (stem + extension, whole_picture + extension) if whole_picture else (stem + extension,)


def stem_of(picture: str) -> str:
    """The name of a picture without its extension."""
    return picture[: picture.rindex(".")]


def _read_captions(
    subset: SubsetOptions, files: dict[str, str], index: FolderIndex, opened: OpenedFolder
) -> tuple[dict[str, str], list[str], list[str]]:
    """Picture -> caption, notes, and problems."""
    if texts := index.texts_of(list(files.values())):
        captions = captions_of(texts, subset.enable_wildcard)
        return dict(zip(files, captions, strict=True)), _empty(subset, files, captions), []
    found = list(map(index.captions.get, files.values()))
    problems: dict[str, None] = {}  # each once, where several pictures share a caption
    for place, name in [item for item in enumerate(files.values()) if found[item[0]] is None]:
        try:
            found[place] = index.caption(name, opened)
            if found[place] is None:
                problems[
                    f"{subset.image_dir / name} is neither UTF-8, UTF-16 with a mark at its start, nor GBK; "
                    "save it as UTF-8"
                ] = None
        except TooLarge:
            problems[f"{subset.image_dir / name} is no caption: it is larger than {MAX_CAPTION_BYTES // 10**6} MB"] = (
                None
            )
        except OSError as error:
            problems[f"{subset.image_dir / name} cannot be read: {error.strerror}"] = None
    if problems:
        files = {picture: name for (picture, name), file in zip(files.items(), found, strict=True) if file}
    found = as_neighbours([file for file in found if file])
    captions = captions_of([file.text for file in found], subset.enable_wildcard)
    notes = []
    if not_utf8 := _unique(name for name, file in zip(files.values(), found, strict=True) if file.encoding == "gbk"):
        notes.append(f"captions in {subset.image_dir} read as GBK, not UTF-8: {quoted_list(not_utf8, limit=3)}")
    notes += _empty(subset, files, captions)
    return dict(zip(files, captions, strict=True)), notes, list(problems)


def _empty(subset: SubsetOptions, files: dict[str, str], captions: list[str]) -> list[str]:
    """A note on empty captions."""
    if "" not in captions:
        return []
    empty = _unique(name for name, caption in zip(files.values(), captions, strict=True) if not caption)
    return [f"captions in {subset.image_dir} that are empty: {quoted_list(empty, limit=3)}"]


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _fallback(subset: SubsetOptions) -> str:
    return f'the caption "{subset.class_tokens}" of the folder\'s name' if subset.class_tokens else "an empty caption"


def _pillow_reads(extension: str) -> bool:
    if extension == ".avif":
        return features.check("avif") or extension in Image.registered_extensions()
    return extension != ".jxl" or extension in Image.registered_extensions()
