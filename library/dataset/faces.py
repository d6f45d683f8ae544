"""Crops around a face whose place is in the picture's name (`--face_crop_aug_range`). Needs no torch."""

import random
import re
from dataclasses import dataclass
from pathlib import Path

from library.dataset.config import Size

_NAME = re.compile(r".*_(\d+)_(\d+)_(\d+)_(\d+)")


@dataclass(frozen=True)
class Face:
    """Where a face is in its picture, in pixels."""

    centre_xy: tuple[int, int]
    side: int  # the longer one


def face_of(path: Path) -> Face | None:
    """The face that a name such as x_<centre x>_<centre y>_<width>_<height>.png tells of."""
    match = _NAME.fullmatch(path.stem)
    if match is None:
        return None
    x, y, width, height = map(int, match.groups())
    return Face((x, y), max(width, height)) if width and height else None


def face_crop(
    face: Face, image_wh: Size, target_wh: Size, range_: tuple[float, float], rng: random.Random, at_random: bool
) -> tuple[Size, tuple[int, int]]:
    """The size to which a picture is resized, and left and top of the crop in it.

    The shorter side of the crop is a random number of face sizes within the range, as far as the picture covers the
    crop and is not enlarged for it. The face is in the middle, or with at_random most likely there.
    """
    covering = max(target / side for target, side in zip(target_wh, image_wh, strict=True))
    wanted = (min(target_wh) / (face.side * factor) for factor in range_)
    scale = rng.uniform(*(min(max(scale, covering), max(covering, 1.0)) for scale in wanted))
    resized = [max(int(side * scale + 0.5), target) for side, target in zip(image_wh, target_wh, strict=True)]
    left_top = [
        _offset(resized_side - target, centre * scale - target / 2, rng if at_random else None)
        for resized_side, target, centre in zip(resized, target_wh, face.centre_xy, strict=True)
    ]
    return (resized[0], resized[1]), (left_top[0], left_top[1])


def _offset(trim: int, centred: float, rng: random.Random | None) -> int:
    """Left or top of a crop, in [0, trim]."""
    centred = min(max(centred, 0), trim)
    return int((rng.triangular(0, trim, centred) if rng else centred) + 0.5)
