"""The pictures of a folder cropped: `crop_images.py`."""

import logging
from collections import Counter
from pathlib import Path
from typing import Any

from PIL import Image

from library.dataset.buckets import choose_bucket
from library.errors import UserError, counted, quoted_list
from library.panels import BLACK, GREY, ORANGE, Layout, Line, Panel, Tile
from library.preparing import focus
from library.preparing.cropping import CONTRAST, Crop, crop_picture, whole_with_crop
from library.preparing.jobs import Job, copy_companions, finish, jobs_left, run_jobs
from library.preparing.picture_io import ending_for, read_picture, write_picture
from library.preparing.sheets import write_sheets
from library.preparing.sizes import crop_sizes
from library.preparing.sources import check_apart, sources_in

logger = logging.getLogger(__name__)

LAYOUT = Layout(picture=220, columns=7)
SETTINGS = ("focus", "zoom", "size", "resolution", "min_bucket_reso", "max_bucket_reso", "bucket_reso_steps", "quality")

Cropped = tuple[Crop, Image.Image | None]  # and the whole picture with the crop in it, where a sheet is asked for


def crop_folder(options: Any) -> None:
    """Crop the pictures of a folder as the options say."""
    source, target = Path(options.src_dir), Path(options.dst_dir)
    problems = check_apart(source, target, "--src_dir", "--dst_dir")
    if options.focus == "face" and not focus.has_detectors():
        problems.append(f"--focus face needs OpenCV 4, which finds faces: {focus.NEEDS_OPENCV_4}")
    if problems:
        raise UserError(*problems)
    if options.focus == "subject" and not focus.has_detectors():
        logger.warning("this OpenCV finds neither faces nor people: --focus subject goes by contrast alone")
    sizes = crop_sizes(options)
    jobs = [
        Job(picture, ((target / picture.inside).with_suffix(ending_for(picture.path, options.format)),))
        for picture in sources_in(source, "--src_dir", left_out=target)
    ]

    def make(job: Job) -> Cropped:
        picture = read_picture(job.source.path)
        choice = choose_bucket(picture.size_wh, sizes, sizes[0], options.bucket_reso_steps, no_upscale=False)
        cropped, crop = crop_picture(picture, choice, options.focus, options.zoom)
        write_picture(job.targets[0], cropped, options.quality)
        copy_companions(job)
        return crop, whole_with_crop(picture.opaque, crop, LAYOUT.picture) if options.sheet else None

    settings = {"script": "crop", **{name: getattr(options, name) for name in SETTINGS}}
    left = jobs_left(jobs, target, "--dst_dir", settings, options.overwrite)
    done = run_jobs(left, make, "cropping")
    for line in summary([(job, crop) for job, (crop, _) in done.results], options.focus):
        logger.info(line)
    if options.sheet and done.results:
        write_sheets(panels_of(done.results, options.focus), f"crops of {source}", Path(options.sheet), LAYOUT)
    finish(done, target)


def summary(crops: list[tuple[Job, Crop]], wanted: str) -> list[str]:
    """What the crops went by, and which pictures were enlarged."""
    lines = []
    if wanted != "centre" and crops:
        counts = Counter(crop.around for _, crop in crops)
        lines.append("cropped " + ", ".join(f"{count} by {around}" for around, count in counts.most_common()))
    enlarged = sorted(((crop.enlarged, job.source.path.name) for job, crop in crops if crop.enlarged > 1), reverse=True)
    if enlarged:
        listed = quoted_list([f"{name} {factor:.1f} times" for factor, name in enlarged])
        lines.append(
            f"{counted(len(enlarged), 'picture')} smaller than the crop and enlarged ({listed}); upscale_images.py "
            "with a model does that better"
        )
    return lines


def panels_of(results: list[tuple[Job, Cropped]], wanted: str) -> list[Panel]:
    """A panel for each size, with the whole pictures and what is kept of them."""
    panels: dict[tuple[int, int], list[Tile]] = {}
    for job, (crop, picture) in results:
        is_guess = wanted != "centre" and crop.around == CONTRAST
        lines = [
            Line(job.source.inside.as_posix(), BLACK),
            Line(f"by {crop.around}, {crop.share_cut:.0%} cut off", ORANGE if is_guess else GREY),
        ]
        if crop.enlarged > 1:
            lines.append(Line(f"enlarged {crop.enlarged:.1f} times", ORANGE))
        panels.setdefault(crop.target_wh, []).append(Tile(picture, tuple(lines)))
    return [
        Panel(f"{width}x{height}, {counted(len(tiles), 'picture')}", tiles)
        for (width, height), tiles in sorted(panels.items())
    ]
