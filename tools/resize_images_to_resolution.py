"""Make pictures smaller: each of a folder at one or several sizes.

python tools/resize_images_to_resolution.py photos small --max_resolution 1024x1024 --divisible_by 64
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.errors import run_script
from library.logs import start_logging
from library.options.checks import at_least, problems_of
from library.options.cli import read_options
from library.options.fields import REQUIRED, OptionGroup, option
from library.options.groups import LoggingOptions
from library.preparing.options import check_quality
from library.preparing.sizes import INTERPOLATIONS, resolutions_of


@dataclass(frozen=True, kw_only=True)
class ResizeOptions(OptionGroup):
    """Make pictures smaller"""

    src_img_folder: str = option(REQUIRED, "folder of pictures", flag_type="path", is_positional=True)
    dst_img_folder: str = option(REQUIRED, "folder that the smaller ones go to", flag_type="path", is_positional=True)
    max_resolution: str = option(
        "512x512,384x384,256x256,128x128", "sizes, separated by commas: each picture is made at most as large in area"
    )
    divisible_by: int = option(1, "cut the edges so that the sides are multiples of this many pixels")
    interpolation: str | None = option(
        None, "how pictures are resized; area to shrink and lanczos to enlarge when not given", choices=INTERPOLATIONS
    )
    save_as_png: bool = option(False, "write PNG files instead of JPEG")
    copy_associated_files: bool = option(False, "copy captions and other files of a picture's name beside it")
    upscale: bool = option(False, "enlarge pictures that are smaller, which are kept as they are otherwise")
    quality: int = option(100, "quality of JPEG files, from 1 to 100")
    overwrite: bool = option(False, "make again what is there already")

    def check(self) -> list[str]:
        return (
            problems_of(resolutions_of, self.max_resolution) + at_least(self, 1, "divisible_by") + check_quality(self)
        )


OPTIONS = ResizeOptions


def main(argv: list[str] | None = None) -> None:
    start_logging(LoggingOptions())
    options = read_options(OPTIONS, argv)
    from library.preparing.resizing import resize_folder  # numpy and OpenCV

    resize_folder(options)


if __name__ == "__main__":
    run_script(main)
