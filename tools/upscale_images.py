"""Enlarge pictures, with a model such as Real-ESRGAN or SwinIR from a local file, or else by Lanczos.

python tools/upscale_images.py --src_dir small --dst_dir large --resolution 1024 --model RealESRGAN_x4plus.pth
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.errors import run_script
from library.logs import start_logging
from library.options.checks import above_zero, at_least, existing_file, problems_of
from library.options.cli import read_options
from library.options.derived import resolution_wh
from library.options.fields import REQUIRED, OptionGroup, option
from library.options.groups import LoggingOptions
from library.preparing.options import WritingOptions

MODEL_FLAGS = ("tile", "tile_overlap", "device", "fp16")


@dataclass(frozen=True, kw_only=True)
class UpscaleOptions(OptionGroup):
    """What is enlarged, and how"""

    src_dir: str = option(REQUIRED, "folder of pictures", flag_type="path")
    dst_dir: str = option(REQUIRED, "folder that the larger ones go to, with the captions", flag_type="path")
    scale: float | None = option(None, "enlarge all this many times; as much as the model does, or 2, when not given")
    resolution: str | None = option(
        None, "enlarge only pictures of a smaller area than this size, to that area: SIDE or WIDTH,HEIGHT"
    )
    model: str | None = option(
        None, "file of a model that enlarges pictures, read by the package spandrel; Lanczos when not given",
        flag_type="path",
    )  # fmt: skip
    tile: int = option(512, "longest side in pixels of what the model sees at once; a smaller one needs less memory")
    tile_overlap: int = option(32, "pixels by which tiles overlap")
    device: str | None = option(None, "where the model runs, such as cuda or cpu; the GPU if there is one")
    fp16: bool = option(False, "run the model in half precision")

    def check(self) -> list[str]:
        problems = above_zero(self, "scale") + at_least(self, 32, "tile") + at_least(self, 0, "tile_overlap")
        if self.scale is not None and 0 < self.scale < 1:
            problems.append(f"--scale must be at least 1, got {self.scale}; resize_images_to_resolution.py shrinks")
        if self.resolution is not None:
            problems += problems_of(resolution_wh, self)
            if self.scale is not None:
                problems.append("--resolution does not go with --scale: one of the two says how large")
        if self.tile_overlap > self.tile // 2:
            problems.append(f"--tile_overlap must be at most half of --tile, got {self.tile_overlap} of {self.tile}")
        if self.model is None:
            given = [name for name in MODEL_FLAGS if name in self.sources]
            problems += [f"--{name} needs --model: Lanczos knows nothing of it" for name in given]
        return problems + (existing_file("model", self.model) if self.model else [])


@dataclass(frozen=True, kw_only=True)
class UpscaleImagesOptions(UpscaleOptions, WritingOptions):
    """Enlarge pictures"""


OPTIONS = UpscaleImagesOptions


def main(argv: list[str] | None = None) -> None:
    start_logging(LoggingOptions())
    options = read_options(OPTIONS, argv)
    from library.preparing.upscaling import upscale_folder  # numpy and OpenCV

    upscale_folder(options)


if __name__ == "__main__":
    run_script(main)
