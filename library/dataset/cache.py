"""Latents on disk: kohya's file names and keys, written whole or not at all."""

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from library.errors import UserError
from library.files import written_whole

_DAMAGED = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)  # what numpy raises on a damaged file


@dataclass(frozen=True)
class CachedLatents:
    """The latents of one picture, as the VAE gives them, not scaled."""

    latents: np.ndarray  # [C, h, w] float32
    original_size_wh: tuple[int, int]  # pixels
    crop_ltrb: tuple[float, float, float, float]  # pixels
    latents_flipped: np.ndarray | None = None  # of the mirrored picture
    alpha_mask: np.ndarray | None = None  # [H, W] float32 in [0, 1], at the bucket's size in pixels


def latents_path(image_path: str | Path, size_wh: tuple[int, int], suffix: str = "sd") -> Path:
    """Where the latents of a picture lie: <name>_0512x0768_sd.npz, or an older <name>.npz that holds some."""
    image_path = Path(image_path)
    legacy = image_path.with_name(f"{image_path.stem}.npz")
    if legacy.exists() and _holds_latents(legacy):
        return legacy
    return image_path.with_name(f"{image_path.stem}_{size_wh[0]:04d}x{size_wh[1]:04d}_{suffix}.npz")


def read_latents(path: str | Path) -> CachedLatents:
    """The latents of one file; a UserError where it is missing or damaged."""
    try:
        return _read(path)
    except _DAMAGED as error:
        raise UserError(f"cached latents {path} cannot be read ({error}); delete the file and train again") from error


def write_latents(path: str | Path, cached: CachedLatents) -> None:
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
    try:
        with written_whole(path, durable=False) as temporary, open(temporary, "wb") as file:
            np.savez(file, **arrays)
    except OSError as error:
        raise UserError(
            f"latents cannot be written to {path} ({error.strerror}); --cache_latents alone keeps them in memory"
        ) from error


def is_valid(path: str | Path, bucket_wh: tuple[int, int], flip: bool, masked: bool = False) -> bool:
    """Whether the file is there, whole, of the bucket's size, and has mirrored latents and mask where wanted."""
    try:
        cached = _read(path)
    except _DAMAGED:
        return False
    if masked and (cached.alpha_mask is None or cached.alpha_mask.shape != bucket_wh[::-1]):
        return False
    size_hw = (bucket_wh[1] // 8, bucket_wh[0] // 8)
    wanted = [cached.latents, cached.latents_flipped] if flip else [cached.latents]
    return all(latents is not None and latents.shape[-2:] == size_hw for latents in wanted)


def _read(path: str | Path) -> CachedLatents:
    with np.load(path, allow_pickle=False) as file:
        latents, original_size, crop_ltrb = (file[key] for key in ("latents", "original_size", "crop_ltrb"))
        flipped, mask = file.get("latents_flipped"), file.get("alpha_mask")
    width, height = (int(side) for side in original_size)
    left, top, right, bottom = (float(edge) for edge in crop_ltrb)
    return CachedLatents(latents, (width, height), (left, top, right, bottom), flipped, mask)


def _holds_latents(path: Path) -> bool:
    try:
        with np.load(path, allow_pickle=False) as file:
            return "latents" in file
    except _DAMAGED:
        return False
