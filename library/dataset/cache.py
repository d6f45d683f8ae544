"""Latents on disk: kohya's file names and keys, written whole or not at all, and keys of our own for their origin.

Kohya reads its own keys alone. Where it adds to a file of ours, as mirrored latents, it keeps our keys and replaces
the latents; so the origin holds a checksum of them, and with other latents it no longer counts.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from library.dataset.array_files import DAMAGED, KnownArrays, open_arrays, read_arrays, write_arrays
from library.dataset.file_marks import FileMark
from library.errors import UserError

KEYS = ("latents", "original_size", "crop_ltrb", "latents_flipped", "alpha_mask")


@dataclass(frozen=True)
class CachedLatents:
    """The latents of one picture, as the VAE gives them, not scaled."""

    latents: np.ndarray  # [C, h, w] float32
    original_size_wh: tuple[int, int]  # pixels
    crop_ltrb: tuple[float, float, float, float]  # pixels
    latents_flipped: np.ndarray | None = None  # of the mirrored picture
    alpha_mask: np.ndarray | None = None  # [H, W] float32 in [0, 1], at the bucket's size in pixels


@dataclass(frozen=True)
class Origin:
    """What latents were made from."""

    picture: FileMark
    mask: FileMark | None  # of the mask picture, where there is one
    resized: str  # how the picture was made smaller or larger: "597x448 area"
    vae: np.ndarray  # [C, h, w] float32, what the VAE makes of a test picture


def latents_path(image_path: str | Path, size_wh: tuple[int, int], suffix: str = "sd") -> Path:
    """Where the latents of a picture lie: <name>_0512x0768_sd.npz, or an older <name>.npz that holds some."""
    image_path = Path(image_path)
    legacy = image_path.with_name(f"{image_path.stem}.npz")
    if legacy.is_file() and _holds_latents(legacy):
        return legacy
    return image_path.with_name(f"{image_path.stem}_{size_wh[0]:04d}x{size_wh[1]:04d}_{suffix}.npz")


def read_latents(path: str | Path, known: KnownArrays | None = None) -> CachedLatents:
    """The latents of one file; a UserError where it is missing or damaged.

    `known`, which is of KEYS, is for files that are read again and again.
    """
    try:
        return _cached_latents(known.read(path) if known else read_arrays(path, KEYS))
    except DAMAGED as error:
        raise UserError(f"cached latents {path} cannot be read ({error}); delete the file and train again") from error


def write_latents(path: str | Path, cached: CachedLatents, origin: Origin | None = None) -> None:
    """Write one file by way of a temporary one, so that a killed run leaves no half of it."""
    path = Path(path)
    arrays = {
        "latents": cached.latents.astype(np.float32),
        "original_size": np.array(cached.original_size_wh, dtype=np.int64),
        "crop_ltrb": np.array(cached.crop_ltrb, dtype=np.float64),
    }
    if cached.latents_flipped is not None:
        arrays["latents_flipped"] = cached.latents_flipped.astype(np.float32)
    if cached.alpha_mask is not None:
        arrays["alpha_mask"] = cached.alpha_mask.astype(np.float32)
    if origin is not None:
        arrays |= _origin_arrays(origin, arrays["latents"])
    write_arrays(path, arrays, "latents", "cache_latents")


def read_with_origin(path: str | Path) -> tuple[CachedLatents, Origin | None]:
    """The latents and what they were made from; raises one of DAMAGED where the file is."""
    with open_arrays(path) as file:
        cached = _cached_latents(file)
        return cached, _origin(file, cached.latents)


def _cached_latents(file: Mapping[str, np.ndarray]) -> CachedLatents:
    latents, original_size, crop_ltrb = (file[key] for key in ("latents", "original_size", "crop_ltrb"))
    if latents.dtype.kind != "f" or latents.ndim != 3:
        raise ValueError(f"latents are {latents.dtype} of {latents.ndim} dimensions")
    flipped, mask = file.get("latents_flipped"), file.get("alpha_mask")
    width, height = (int(side) for side in original_size)
    left, top, right, bottom = (float(edge) for edge in crop_ltrb)
    return CachedLatents(latents, (width, height), (left, top, right, bottom), flipped, mask)


def _holds_latents(path: Path) -> bool:
    try:
        with open_arrays(path) as file:
            return "latents" in file
    except DAMAGED:
        return False


def _origin_arrays(origin: Origin, latents: np.ndarray) -> dict[str, np.ndarray]:
    marks = [mark.as_array() for mark in (origin.picture, origin.mask) if mark]
    return {
        "athanor_files": np.stack(marks),
        "athanor_resized": np.array(origin.resized),
        "athanor_vae": origin.vae.astype(np.float32),
        "athanor_checksum": np.array(_checksum(latents)),
    }


def _origin(file: np.lib.npyio.NpzFile, latents: np.ndarray) -> Origin | None:
    if "athanor_checksum" not in file or file["athanor_checksum"] != _checksum(latents):
        return None
    picture, *mask = map(FileMark.from_array, file["athanor_files"])
    return Origin(picture, mask[0] if mask else None, str(file["athanor_resized"]), file["athanor_vae"])


def _checksum(latents: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(latents))
