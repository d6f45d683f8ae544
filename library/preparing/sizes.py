"""Sizes as they are written in flags. Needs neither numpy nor OpenCV."""

import re
from typing import Any

from library.dataset.buckets import bucket_settings
from library.dataset.config import DatasetSpec, Size
from library.errors import UserError
from library.options.derived import MAX_SIDE, resolution_wh

STEP = 64  # pixels; what every model takes
INTERPOLATIONS = ("area", "cubic", "lanczos4", "nearest", "linear", "box")


def resolutions_of(text: str) -> list[Size]:
    """Widths and heights of "512x512,768x512"; only their areas count."""
    sizes = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,5})\s*[xX]\s*(\d{1,5})\s*", part)
        if match is None or not all(0 < int(side) <= MAX_SIDE for side in match.groups()):
            raise UserError(
                "--max_resolution must be sizes such as 512x512,384x384 (WIDTHxHEIGHT, separated by commas), "
                f"got {text!r}"
            )
        sizes.append((int(match[1]), int(match[2])))
    return list(dict.fromkeys(sizes))


def crop_sizes(options: Any) -> list[Size]:
    """What `crop_images.py` crops to: the one --size, or all buckets of --resolution."""
    if (options.size is None) == (options.resolution is None):
        raise UserError("give --size, such as 512,768, or --resolution for the buckets of training, and not both")
    if options.resolution is None:
        size = re.fullmatch(r"\s*(\d{1,5})\s*(?:[,xX]\s*(\d{1,5})\s*)?", options.size)
        sides = [int(side) for side in size.groups(default=size[1])] if size else [0]
        if not all(0 < side <= MAX_SIDE and side % STEP == 0 for side in sides):
            raise UserError(
                f"--size must be a size in multiples of {STEP}, such as 512 or 512,768, got {options.size!r}"
            )
        return [(sides[0], sides[1])]
    ranges = {name: getattr(options, name) for name in ("min_bucket_reso", "max_bucket_reso", "bucket_reso_steps")}
    spec = DatasetSpec(
        resolution=options.resolution,
        batch_size=1,
        enable_bucket=True,
        bucket_no_upscale=False,
        resize_interpolation=None,
        **ranges,
    )
    resolution_wh(spec)
    if problems := spec.problems():
        raise UserError(*(f"--{problem}" for problem in problems))
    return bucket_settings(spec).resolutions
