"""Pictures made smaller, to several sizes at once."""

import math
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from library.dataset.config import Size
from library.dataset.images import resize
from library.errors import UserError
from library.preparing.jobs import Job, copy_companions, finish, jobs_left, run_jobs
from library.preparing.picture_io import Picture, read_picture, write_picture
from library.preparing.sizes import resolutions_of
from library.preparing.sources import check_apart, sources_in


def resize_folder(options: Any) -> None:
    """Make the pictures of a folder smaller, as the options of `resize_images_to_resolution.py` say."""
    source, target = Path(options.src_img_folder), Path(options.dst_img_folder)
    if problems := check_apart(source, target, "src_img_folder", "dst_img_folder"):
        raise UserError(*problems)
    sizes = resolutions_of(options.max_resolution)
    ending = ".png" if options.save_as_png else ".jpg"
    jobs = [
        Job(picture, tuple((target / picture.inside).with_name(f"{picture.stem}+{w}x{h}{ending}") for w, h in sizes))
        for picture in sources_in(source, "src_img_folder", left_out=target)
    ]
    names = ("divisible_by", "interpolation", "upscale", "quality")
    settings = {"script": "resize", **{name: getattr(options, name) for name in names}}

    def make(job: Job) -> None:
        picture = read_picture(job.source.path)
        for path, max_wh in zip(job.targets, sizes, strict=True):
            small = fitted(picture, max_wh, options.divisible_by, options.interpolation, options.upscale)
            write_picture(path, small, options.quality)
        if options.copy_associated_files:
            copy_companions(job)

    left = jobs_left(jobs, target, "dst_img_folder", settings, options.overwrite)
    finish(run_jobs(left, make, "resizing"), target)


def resized_wh(image_wh: Size, max_wh: Size, upscale: bool) -> Size:
    """The picture's size at the area of another size, its shape kept; smaller ones keep theirs without `upscale`."""
    scale = math.sqrt(max_wh[0] * max_wh[1] / (image_wh[0] * image_wh[1]))
    if scale >= 1 and not upscale:
        return image_wh
    return max(1, int(image_wh[0] * scale)), max(1, int(image_wh[1] * scale))


def fitted(picture: Picture, max_wh: Size, divisible_by: int, interpolation: str | None, upscale: bool) -> Picture:
    """The picture at most as large as the area of `max_wh`, its edges cut so that the sides are divisible."""
    pixels = resize_as(picture.pixels, resized_wh(picture.size_wh, max_wh, upscale), interpolation)
    return picture.with_pixels(cut_to_multiple(pixels, divisible_by))


def resize_as(pixels: np.ndarray, size_wh: Size, interpolation: str | None) -> np.ndarray:
    """The picture [H, W, C] at another size; area to shrink and Lanczos to enlarge where nothing is named."""
    if interpolation == "lanczos4":
        return cv2.resize(pixels, size_wh, interpolation=cv2.INTER_LANCZOS4)
    return resize(pixels, size_wh, interpolation)


def cut_to_multiple(pixels: np.ndarray, divisor: int) -> np.ndarray:
    """The middle of the picture [H, W, C] whose sides are multiples; a side shorter than one multiple stays."""
    height, width = (side // divisor * divisor or side for side in pixels.shape[:2])
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return pixels[top : top + height, left : left + width]
