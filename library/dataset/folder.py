"""The pictures and captions of one folder, found by name and read once."""

import codecs
import importlib
import os
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image, features

from library.dataset.config import Size, SubsetOptions, is_file, is_picture_name
from library.dataset.info_cache import read_sizes
from library.dataset.picture_index import FolderIndex, PictureIndex
from library.errors import quoted_list
from library.texts import fits

for _plugin in ("pillow_avif", "pillow_jxl"):  # they register themselves with Pillow
    with suppress(ImportError):
        importlib.import_module(_plugin)

CAPTION_EXTENSIONS = (".txt", ".caption")  # looked for where the configured one is nowhere in a folder
MAX_CAPTION_BYTES = 10**6


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

    def path(self, picture: str) -> Path:
        return Path(self.subset.image_dir or "", picture)


def read_folder(subset: SubsetOptions, index: PictureIndex) -> Folder:
    """List a subset's folder once and read its captions; what cannot be read is in `problems`."""
    try:
        files = index.folder(subset.image_dir)
    except OSError as error:
        return Folder(subset, problems=[f"{subset.image_dir} cannot be read: {error.strerror}"])
    names = sorted(files.entries)
    pictures, notes = _pictures(subset, names)
    subset, caption_files, more_notes = _find_captions(subset, pictures, names)
    captions, yet_more_notes, problems = _read_captions(subset, caption_files, files)
    masks, mask_problems = _find_masks(subset, pictures)
    sizes, size_notes = read_sizes(subset.image_dir) if subset.cache_info else ({}, [])
    sizes |= {name: known.size_wh for name in pictures if (known := files.picture(name))}
    notes += more_notes + yet_more_notes + size_notes
    return Folder(subset, pictures, captions, masks, sizes, notes=notes, problems=problems + mask_problems)


def _pictures(subset: SubsetOptions, names: list[str]) -> tuple[list[str], list[str]]:
    """The pictures among the files, and notes."""
    found = [name for name in names if is_picture_name(name)]
    pictures = [name for name in found if _pillow_reads(os.path.splitext(name)[1].lower())]
    notes = []
    if left_out := sorted(set(found) - set(pictures)):
        listed = quoted_list(left_out, limit=3)
        notes.append(f"pictures in {subset.image_dir} that this Pillow cannot read are left out: {listed}")
    if not pictures:
        notes.append(f"there are no pictures in {subset.image_dir}")
    stems = Counter(os.path.splitext(name)[0] for name in pictures)
    if doubled := [stem for stem, count in stems.items() if count > 1]:
        listed = quoted_list(doubled, limit=3)
        notes.append(f"pictures in {subset.image_dir} share caption and cache file, differing in extension: {listed}")
    return pictures, notes


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
    subset: SubsetOptions, pictures: list[str], names: list[str]
) -> tuple[SubsetOptions, dict[str, str], list[str]]:
    """The subset with the extension to take, picture -> caption file, and notes on what is missing."""
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


def _caption_files(pictures: list[str], names: list[str], extension: str) -> dict[str, str]:
    """Picture -> caption file, for those that have one."""
    files = {os.path.normcase(name): name for name in names}  # on Windows a.TXT is a.txt
    candidates = ((picture, map(os.path.normcase, caption_names(picture, extension))) for picture in pictures)
    found = ((picture, next((files[key] for key in keys if key in files), None)) for picture, keys in candidates)
    return {picture: file for picture, file in found if file is not None}


def caption_names(picture: str, extension: str) -> list[str]:
    """Where a picture's caption may be; x_<left>_<top>_<width>_<height>.png, a face cut out, may use that of x."""
    stem = os.path.splitext(picture)[0]
    whole_picture = "_".join(stem.split("_")[:-4])
    return [stem + extension] + ([whole_picture + extension] if whole_picture else [])


def _read_captions(
    subset: SubsetOptions, files: dict[str, str], index: FolderIndex
) -> tuple[dict[str, str], list[str], list[str]]:
    """Picture -> caption, notes, and problems."""
    contents: dict[str, bytes] = {}
    problems = []
    for name in sorted(set(files.values())):
        path = subset.image_dir / name
        try:
            if index.entries[name].stat().st_size <= MAX_CAPTION_BYTES:
                contents[name] = index.caption(name)
            else:
                problems.append(f"{path} is no caption: it is larger than {MAX_CAPTION_BYTES // 10**6} MB")
        except OSError as error:
            problems.append(f"{path} cannot be read: {error.strerror}")
    encodings = _encodings(contents)
    problems += [
        f"{subset.image_dir / name} is neither UTF-8, UTF-16 with a mark at its start, nor GBK; save it as UTF-8"
        for name, encoding in encodings.items()
        if encoding is None
    ]
    texts = {name: contents[name].decode(encoding) for name, encoding in encodings.items() if encoding}
    captions = {name: _caption(text, subset.enable_wildcard) for name, text in texts.items()}
    notes = []
    if not_utf8 := [name for name, encoding in encodings.items() if encoding == "gbk"]:
        notes.append(f"captions in {subset.image_dir} read as GBK, not UTF-8: {quoted_list(not_utf8, limit=3)}")
    if empty := [name for name, caption in captions.items() if not caption]:
        notes.append(f"captions in {subset.image_dir} that are empty: {quoted_list(empty, limit=3)}")
    return {picture: captions[name] for picture, name in files.items() if name in captions}, notes, problems


def _fallback(subset: SubsetOptions) -> str:
    return f'the caption "{subset.class_tokens}" of the folder\'s name' if subset.class_tokens else "an empty caption"


def _encodings(contents: dict[str, bytes]) -> dict[str, str | None]:
    """The encoding of each file of a folder; None where none fits.

    A few Chinese characters in GBK, such as 猫, are by chance good UTF-8 of Cyrillic or Arabic letters: beside
    files that can only be GBK they are taken as GBK too.
    """
    encodings = {name: _encoding(data) for name, data in contents.items()}
    if "gbk" in encodings.values():
        doubtful = [name for name, encoding in encodings.items() if encoding == "utf-8-sig"]
        encodings |= {name: "gbk" for name in doubtful if _is_gbk_by_chance_utf8(contents[name])}
    return encodings


def _encoding(data: bytes) -> str | None:
    is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    candidates = ("utf-16",) if is_utf16 else ("utf-8-sig", "gbk")
    return next((codec for codec in candidates if fits(data, codec) and "\0" not in data.decode(codec)), None)


def _is_gbk_by_chance_utf8(data: bytes) -> bool:
    return "\u007f" < max(data.decode("utf-8-sig"), default="") < "\u0800" and fits(data, "gbk")


def _caption(text: str, all_lines: bool) -> str:
    """The first line, or all lines that are not blank, one of which wildcards choose at each step."""
    lines = [line.strip() for line in text.splitlines()]
    return "\n".join(line for line in lines if line) if all_lines else next(iter(lines), "")


def _pillow_reads(extension: str) -> bool:
    if extension == ".avif":
        return features.check("avif") or extension in Image.registered_extensions()
    return extension != ".jxl" or extension in Image.registered_extensions()
