"""The pictures of a folder enlarged: `upscale_images.py`."""

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from library.dataset.config import Size
from library.dataset.images import resize
from library.errors import UserError
from library.options.derived import resolution_wh
from library.preparing.jobs import Job, copy_companions, copy_file, finish, jobs_left, run_jobs
from library.preparing.picture_io import ending_for, read_picture, write_picture
from library.preparing.sources import check_apart, sources_in

logger = logging.getLogger(__name__)

MAX_PIXELS = 2 * 10**8  # of an enlarged picture
SETTINGS = ("scale", "resolution", "model", "tile", "tile_overlap", "fp16", "quality")

Enlarge = Callable[[np.ndarray], np.ndarray]  # [H, W, 3] -> a whole number of times as large


def upscale_folder(options: Any) -> None:
    """Enlarge the pictures of a folder as the options say; those that are large enough are copied."""
    source, target = Path(options.src_dir), Path(options.dst_dir)
    if problems := check_apart(source, target, "--src_dir", "--dst_dir"):
        raise UserError(*problems)
    jobs = [
        Job(picture, ((target / picture.inside).with_suffix(ending_for(picture.path, options.format)),))
        for picture in sources_in(source, "--src_dir", left_out=target)
    ]
    settings = {"script": "upscale", **{name: getattr(options, name) for name in SETTINGS}}
    enlarge, scale = _model(options) if options.model else (None, 2)
    factor = options.scale or scale
    left = jobs_left(jobs, target, "--dst_dir", settings, options.overwrite)

    def make(job: Job) -> bool:
        picture, path = read_picture(job.source.path), job.targets[0]
        size_wh = wanted_wh(picture.size_wh, factor, resolution_wh(options) if options.resolution else None)
        if size_wh[0] * size_wh[1] > MAX_PIXELS:
            raise UserError(f"{job.source.path} would have more than {MAX_PIXELS // 10**6} million pixels")
        copy_companions(job)
        if size_wh == picture.size_wh and path.suffix == job.source.path.suffix:
            copy_file(job.source.path, path)
        else:
            write_picture(path, picture.with_pixels(enlarged(picture.pixels, size_wh, enlarge)), options.quality)
        return size_wh != picture.size_wh

    done = run_jobs(left, make, "enlarging", num_threads=1 if enlarge else None)
    num_enlarged = sum(was_enlarged for _, was_enlarged in done.results)
    if num_enlarged < len(done.results):
        logger.info("%d of them were large enough and are copied", len(done.results) - num_enlarged)
    finish(done, target)


def wanted_wh(image_wh: Size, factor: float, resolution: Size | None) -> Size:
    """The size that a picture is enlarged to: `factor` times, or to the area of `resolution` if it has less."""
    if resolution:
        factor = max(1.0, math.sqrt(resolution[0] * resolution[1] / (image_wh[0] * image_wh[1])))
    if factor == 1:
        return image_wh
    return math.ceil(image_wh[0] * factor), math.ceil(image_wh[1] * factor)


def enlarged(pixels: np.ndarray, size_wh: Size, enlarge: Enlarge | None) -> np.ndarray:
    """The picture [H, W, C] at a larger size: by the model as often as it takes, the rest by resizing.

    Transparency, and all where there is no model, is enlarged by Lanczos.
    """
    if enlarge is None:
        return resize(pixels, size_wh, "lanczos")
    colour = np.ascontiguousarray(pixels[..., :3])
    while colour.shape[1] < size_wh[0] or colour.shape[0] < size_wh[1]:
        colour = enlarge(colour)
    colour = resize(colour, size_wh)
    if pixels.shape[2] == 3:
        return colour
    return np.dstack([colour, resize(np.ascontiguousarray(pixels[..., 3]), size_wh, "lanczos")])


def _model(options: Any) -> tuple[Enlarge, int]:
    from library.preparing.super_resolution import open_upscaler  # torch

    upscaler = open_upscaler(Path(options.model), options.device, options.fp16)
    logger.info("%s: %s, %d times, on %s", options.model, upscaler.name, upscaler.scale, upscaler.device)
    return lambda pixels: upscaler.enlarged(pixels, options.tile, options.tile_overlap), upscaler.scale
