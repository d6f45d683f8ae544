"""Whether latents on disk are those that a run would make, and if not, why."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from library.dataset.array_files import DAMAGED
from library.dataset.cache import CachedLatents, Origin, read_with_origin
from library.dataset.file_marks import FileMark

# Why latents are made, as the line that counts them says it.
ABSENT = "absent"
BROKEN = "damaged"
OTHER_SIZE = "of another size"
NOT_MIRRORED = "without the mirrored picture"
UNMASKED = "without a mask"
OTHER_PICTURE = "of a picture that has changed"
OTHER_MASK = "of a mask that has changed"
OTHER_RESIZING = "resized in another way"
OTHER_VAE = "made with another VAE"


@dataclass(frozen=True)
class WantedLatents:
    """What the latents of one picture must be."""

    picture: Path
    original_size_wh: tuple[int, int]  # pixels
    bucket_wh: tuple[int, int]  # pixels
    crop_ltrb: tuple[float, float, float, float]  # pixels
    resized: str  # as in Origin
    mirrored: bool
    masked: bool
    mask: Path | None  # a picture of its own; None also where the mask is the picture's transparency
    is_gone: bool = False  # the picture: the latents are all there is of it

    def origin(self, vae: np.ndarray) -> Origin:
        """What latents made now are made from."""
        return Origin(FileMark.of(self.picture), self.mask and FileMark.of(self.mask), self.resized, vae)


@dataclass(frozen=True)
class Finding:
    """What a look at a file gave; the VAE is still to be compared."""

    reason: str | None  # why the latents cannot be used
    vae: np.ndarray | None = None  # as in Origin; None where the file does not say what it was made from


def examine(path: Path, wanted: WantedLatents) -> Finding:
    """Read a whole file and compare it with what is wanted.

    A file without an origin, as kohya's are, is taken if it is not older than the picture.
    """
    try:
        cached, origin = read_with_origin(path)
    except FileNotFoundError:
        return Finding(ABSENT)
    except DAMAGED:
        return Finding(BROKEN)
    reason = _misfit(cached, wanted)
    if not reason and not wanted.is_gone:
        reason = _changed(origin, wanted) if origin else _outdated(path, wanted)
    return Finding(reason, origin.vae if origin else None)


def _misfit(cached: CachedLatents, wanted: WantedLatents) -> str | None:
    latents_hw = (wanted.bucket_wh[1] // 8, wanted.bucket_wh[0] // 8)
    same_size = cached.original_size_wh == wanted.original_size_wh and cached.latents.shape[-2:] == latents_hw
    if not same_size or not np.allclose(cached.crop_ltrb, wanted.crop_ltrb, rtol=0, atol=1):
        return OTHER_SIZE
    if not np.isfinite(cached.latents).all():
        return BROKEN
    if wanted.mirrored and (cached.latents_flipped is None or cached.latents_flipped.shape != cached.latents.shape):
        return NOT_MIRRORED
    if wanted.masked and (cached.alpha_mask is None or cached.alpha_mask.shape != wanted.bucket_wh[::-1]):
        return UNMASKED
    return None


def _changed(origin: Origin, wanted: WantedLatents) -> str | None:
    if not origin.picture.fits(wanted.picture):
        return OTHER_PICTURE
    if origin.resized != wanted.resized:
        return OTHER_RESIZING
    if wanted.masked and not is_same_mask(origin.mask, wanted.mask):
        return OTHER_MASK
    return None


def is_same_mask(mark: FileMark | None, path: Path | None) -> bool:
    return mark.fits(path) if mark and path else mark is path is None


def _outdated(path: Path, wanted: WantedLatents) -> str | None:
    written = path.stat().st_mtime_ns
    if written < wanted.picture.stat().st_mtime_ns:
        return OTHER_PICTURE
    if wanted.mask and written < wanted.mask.stat().st_mtime_ns:
        return OTHER_MASK
    return None
