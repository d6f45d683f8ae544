"""Crop pictures to one size or to the buckets of training, around their centre, their subject, or a face.

python tools/crop_images.py --src_dir photos --dst_dir cropped --size 768 --focus subject --sheet crops.png
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.errors import run_script
from library.logs import start_logging
from library.options.checks import above_zero, problems_of
from library.options.cli import read_options
from library.options.fields import REQUIRED, OptionGroup, option
from library.options.groups import LoggingOptions
from library.preparing.options import WritingOptions, check_sheet
from library.preparing.sizes import crop_sizes


@dataclass(frozen=True, kw_only=True)
class CropOptions(OptionGroup):
    """What is cropped, and how"""

    src_dir: str = option(REQUIRED, "folder of pictures", flag_type="path")
    dst_dir: str = option(REQUIRED, "folder that the crops go to, with the captions", flag_type="path")
    size: str | None = option(None, "size of all crops in pixels, multiples of 64: SIDE or WIDTH,HEIGHT")
    resolution: str | None = option(
        None, "crop each picture to the bucket that training with this --resolution would put it into"
    )
    min_bucket_reso: int = option(256, "shortest side of a bucket in pixels")
    max_bucket_reso: int = option(1024, "longest side of a bucket in pixels")
    bucket_reso_steps: int = option(64, "sides of buckets are multiples of this many pixels")
    focus: str = option(
        "centre",
        "what stays in the crop; where no face or subject is found, what has most contrast",
        choices=("centre", "subject", "face"),
    )
    zoom: float | None = option(
        None, "come closer to a face or subject: the crop's shorter side is this many times as long as what was found"
    )
    sheet: str | None = option(None, "PNG file for a sheet that shows what was cut off each picture", flag_type="path")

    def check(self) -> list[str]:
        problems = problems_of(crop_sizes, self) + above_zero(self, "zoom") + check_sheet(self.sheet)
        if self.zoom and self.focus == "centre":
            problems.append("--zoom needs --focus subject or face: it is measured by what was found")
        return problems


@dataclass(frozen=True, kw_only=True)
class CropImagesOptions(CropOptions, WritingOptions):
    """Crop pictures to a size or to the buckets of training"""


OPTIONS = CropImagesOptions


def main(argv: list[str] | None = None) -> None:
    start_logging(LoggingOptions())
    options = read_options(OPTIONS, argv)
    from library.preparing.crop_folder import crop_folder  # numpy and OpenCV

    crop_folder(options)


if __name__ == "__main__":
    run_script(main)
