"""From folders to records: every picture's size and caption, found and checked without decoding a pixel."""

import os
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image, UnidentifiedImageError

from library.dataset.config import DatasetSpec, SubsetOptions, folder_notes, spec_from_flags, subsets_from_folders
from library.dataset.dataset_config import read_dataset_config
from library.dataset.folder import Folder, read_folder
from library.errors import UserError, quoted_list

Progress = Callable[[int, int], None]  # called with pictures done and pictures in all


@dataclass(frozen=True)
class ImageRecord:
    """One picture of the dataset."""

    path: Path
    size_wh: tuple[int, int]  # pixels, upright as training sees it
    caption: str
    caption_found: bool
    subset: int  # index into ScannedDataset.subsets
    mask_path: Path | None = None  # a picture whose red channel weighs the loss


@dataclass
class ScannedDataset:
    """All pictures of all subsets, and what is worth telling about them."""

    subsets: list[SubsetOptions]
    records: list[ImageRecord]
    notes: list[str]
    specs: list[DatasetSpec] = field(default_factory=list)  # one for each dataset
    num_held_out: int = 0  # pictures kept for validation, which are not among the records

    def spec_of(self, record: ImageRecord) -> DatasetSpec:
        return self.specs[self.subsets[record.subset].dataset]


def scan_dataset(options: Any, progress: Progress | None = None) -> ScannedDataset:
    """The dataset of --dataset_config, or of --train_data_dir and --reg_data_dir."""
    if options.dataset_config:
        specs, subsets, notes = read_dataset_config(options)
    else:
        specs, subsets, notes = [spec_from_flags(options)], subsets_from_folders(options), folder_notes(options)
    scanned = scan(subsets, progress)
    return replace(scanned, notes=notes + scanned.notes, specs=specs)


def scan(subsets: list[SubsetOptions], progress: Progress | None = None) -> ScannedDataset:
    """Read names, sizes and captions of all pictures; everything unreadable is named in one UserError."""
    folders = [read_folder(subset) for subset in subsets]
    num_pictures = sum(len(folder.pictures) for folder in folders)
    records: list[ImageRecord] = []
    unreadable: list[str] = []
    for index, folder in enumerate(folders):
        for name in folder.pictures:
            try:
                records.append(_record(folder, index, name))
            except Exception as error:  # Pillow's readers raise many kinds on damaged files
                path = folder.subset.image_dir / name
                unreadable.append(f"{path} ({unreadable_reason(path, error)})")
            if progress:
                progress(len(records) + len(unreadable), num_pictures)
    if unreadable:  # say at once what else is damaged
        unreadable += _damaged_pictures(records)
    problems = [_unreadable(sorted(unreadable))] if unreadable else []
    problems += [problem for folder in folders for problem in folder.problems]
    if not any(folder.pictures for folder in folders if not folder.subset.is_reg):
        problems.append(f"there are no pictures in {quoted_list([str(s.image_dir) for s in subsets if not s.is_reg])}")
    if problems:
        raise UserError(*problems)
    notes = [note for folder in folders for note in folder.notes]
    return ScannedDataset([folder.subset for folder in folders], records, notes)


def verify_pictures(
    records: Iterable[ImageRecord], num_threads: int | None = None, progress: Progress | None = None
) -> None:
    """Decode every picture once; all that are damaged are named in one UserError."""
    if damaged := _damaged_pictures(records, num_threads, progress):
        raise UserError(_unreadable(damaged))


def exif_orientation(image: Image.Image) -> int:
    """EXIF orientation 1 to 8 of a just opened picture, from its header alone."""
    if image.format == "PNG" and "exif" not in image.info:
        return 1  # getexif() would decode the whole picture to look behind its pixels
    return image.getexif().get(ExifTags.Base.Orientation, 1)


def tag_frequency(scanned: ScannedDataset) -> dict[str, dict[str, int]]:
    """For each folder name, how often each comma-separated tag stands in its captions, without repeats."""
    frequency: dict[str, Counter[str]] = {}
    for record in scanned.records:
        tags = (tag.strip().lower() for tag in record.caption.split(","))
        folder = scanned.subsets[record.subset].image_dir.name
        frequency.setdefault(folder, Counter()).update(tag for tag in tags if tag)
    return {folder: dict(counts) for folder, counts in frequency.items()}


def dataset_dirs(scanned: ScannedDataset) -> dict[str, dict[str, int]]:
    """Repeats and pictures of each training folder, for the metadata."""
    return _dirs(scanned, is_reg=False)


def reg_dataset_dirs(scanned: ScannedDataset) -> dict[str, dict[str, int]]:
    """Repeats and pictures of each regularisation folder, for the metadata."""
    return _dirs(scanned, is_reg=True)


def _dirs(scanned: ScannedDataset, is_reg: bool) -> dict[str, dict[str, int]]:
    num_pictures = Counter(record.subset for record in scanned.records)
    return {
        subset.image_dir.name: {"n_repeats": subset.num_repeats, "img_count": num_pictures[index]}
        for index, subset in enumerate(scanned.subsets)
        if subset.is_reg == is_reg and num_pictures[index]
    }


def _record(folder: Folder, index: int, name: str) -> ImageRecord:
    path, caption = folder.subset.image_dir / name, folder.captions.get(name)
    return ImageRecord(
        path=path,
        size_wh=_upright_size(path),
        caption=(folder.subset.class_tokens or "") if caption is None else caption,
        caption_found=caption is not None,
        subset=index,
        mask_path=folder.masks.get(name),
    )


def _upright_size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        width, height = image.size
        return (height, width) if exif_orientation(image) >= 5 else (width, height)


def _damaged_pictures(
    records: Iterable[ImageRecord], num_threads: int | None = None, progress: Progress | None = None
) -> list[str]:
    """Paths, with reasons, of the pictures that do not decode."""
    paths = sorted({record.path for record in records})
    damaged = []
    with ThreadPoolExecutor(num_threads or min(8, os.cpu_count() or 1)) as pool:
        for done, (path, reason) in enumerate(zip(paths, pool.map(_damage, paths), strict=True), start=1):
            if reason:
                damaged.append(f"{path} ({reason})")
            if progress:
                progress(done, len(paths))
    return damaged


def _damage(path: Path) -> str | None:
    try:
        with Image.open(path) as image:
            image.draft(image.mode, (1, 1))  # JPEG: read all of the file, but build a small picture
            image.load()
    except Exception as error:  # Pillow's readers raise many kinds on damaged files
        return unreadable_reason(path, error)
    return None


def unreadable_reason(path: Path, error: Exception) -> str:
    """Why a picture could not be opened or decoded, in a few words."""
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6} million pixels; make it smaller"
    if isinstance(error, FileNotFoundError):
        return "the file is not there any more"
    with suppress(OSError):
        if path.stat().st_size == 0:
            return "the file is empty"
    if isinstance(error, UnidentifiedImageError):
        return "not a picture that Pillow knows"
    return str(error) or type(error).__name__


def _unreadable(pictures: list[str]) -> str:
    subject = "1 picture" if len(pictures) == 1 else f"{len(pictures)} pictures"
    return f"{subject} cannot be read: " + ", ".join(pictures)
