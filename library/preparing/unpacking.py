"""Datasets as Hugging Face keeps them, unpacked into pictures with caption files: `extract_parquet.py`."""

import io
import logging
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm import tqdm

from library.dataset.picture_files import open_picture, unreadable_reason
from library.dataset.scan import unreadable_pictures
from library.errors import UserError, counted
from library.files import write_bytes_whole, write_text_whole
from library.leftovers import remove_leftovers
from library.options.checks import WINDOWS_DEVICE
from library.preparing.jobs import claim_folder
from library.preparing.picture_io import Unreadable, read_picture, write_picture
from library.preparing.tables import Row, rows_of

logger = logging.getLogger(__name__)

KEPT_AS_THEY_ARE = {"PNG": ".png", "JPEG": ".jpg", "MPO": ".jpg", "WEBP": ".webp", "BMP": ".bmp", "AVIF": ".avif"}
FORBIDDEN = str.maketrans(
    dict.fromkeys('<>:"|?*\\/', "_") | {number: "_" for number in range(32)}
)  # in names, somewhere
MAX_NAME = 120  # characters
SETTINGS = ("image_column", "caption_column", "caption_extension", "format", "quality")


@dataclass
class Extracted:
    """What has come of the rows so far."""

    num_new: int = 0
    num_there: int = 0
    num_without_caption: int = 0


def extract(options: Any) -> None:
    """Unpack a dataset as the options of `extract_parquet.py` say."""
    source, target = Path(options.source), Path(options.output_dir)
    rows, total = rows_of(source, options.image_column, options.caption_column)
    settings = {"script": "extract", "source": str(source.resolve()), "rows": total}
    settings |= {name: getattr(options, name) for name in SETTINGS}
    there = sorted(path for path in target.glob("*") if not path.name.startswith("."))
    claim_folder(target, "output_dir", settings, there, options.overwrite)
    remove_leftovers([target])
    names, so_far, damaged = _Names(total), Extracted(), []
    for row in tqdm(rows, "extracting", total, unit="pictures"):
        stem = names.next(row.name)
        try:
            _extract_row(row, target, stem, options, so_far)
        except Unreadable as error:
            damaged.append(str(error))
    _tell(so_far, target)
    if damaged:
        raise UserError(unreadable_pictures(damaged))


class _Names:
    """Names for pictures without ending: their own, made fit for every system, or their numbers; none twice."""

    def __init__(self, total: int):
        self._taken: set[str] = set()
        self._num_digits = max(6, len(str(total)))
        self._number = 0

    def next(self, name: str | None) -> str:
        self._number += 1
        stem = safe_stem(name) if name else ""
        candidate = stem or f"{self._number:0{self._num_digits}d}"
        stem, count = candidate, 1
        while candidate.casefold() in self._taken:
            count += 1
            candidate = f"{stem}-{count}"
        self._taken.add(candidate.casefold())
        return candidate


def safe_stem(path: str) -> str:
    """The last part of a path without its ending, as a name that every system takes; "" where nothing is left."""
    name = PurePosixPath(path.replace("\\", "/")).name
    stem = os.path.splitext(name)[0].translate(FORBIDDEN).strip(" .")[:MAX_NAME].strip(" .")
    return f"_{stem}" if WINDOWS_DEVICE.match(stem) else stem


def _extract_row(row: Row, folder: Path, stem: str, options: Any, so_far: Extracted) -> None:
    data = row.read()
    try:
        with open_picture(io.BytesIO(data)) as image:
            kind = image.format
            is_kept = options.format == "same" and kind in KEPT_AS_THEY_ARE
            path = folder / (stem + _ending(kind, options.format))
            if path.exists() and not options.overwrite:
                so_far.num_there += 1
                return
            image.load()  # so that a damaged one is named now
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers raise many kinds on damaged files
        raise Unreadable(f"{row.place} ({unreadable_reason(row.place, error)})") from error
    if row.caption is None:
        so_far.num_without_caption += 1
    else:
        write_text_whole(folder / (stem + options.caption_extension), row.caption)
    if is_kept:
        write_bytes_whole(path, data, durable=False)
    else:
        write_picture(path, read_picture(io.BytesIO(data)), options.quality)
    so_far.num_new += 1


def _ending(kind: str, format_name: str) -> str:
    return KEPT_AS_THEY_ARE.get(kind, ".png") if format_name == "same" else f".{format_name}"


def _tell(so_far: Extracted, folder: Path) -> None:
    there = f"; {so_far.num_there} were there already" if so_far.num_there else ""
    logger.info("%s written to %s%s", counted(so_far.num_new, "picture"), folder, there)
    if so_far.num_without_caption:
        logger.warning("%s without a caption", counted(so_far.num_without_caption, "picture"))
