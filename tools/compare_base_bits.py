"""Hold the U-Net of a base model in fewer bits and tell what it costs: memory, errors of its output, and its loss.

python tools/compare_base_bits.py
python tools/compare_base_bits.py my_model.safetensors --resolution 512 --train_data_dir my_pictures

The first is of the embedded base. Prints a table; what its columns are is in docs/networks.md.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.captioning.listing import caption_path, find_pictures, read_captions
from library.errors import UserError, run_script
from library.families import family_of_kind
from library.families.detect import inspect_checkpoint
from library.importing import quick_imports
from library.logs import start_logging
from library.options.checks import at_least
from library.options.cli import read_options
from library.options.fields import OptionGroup, option
from library.options.groups import LoggingOptions

HERE = Path(__file__).resolve().parents[1]
SIDE = 64  # pixels that every size must be a multiple of


@dataclass(frozen=True, kw_only=True)
class CompareBitsOptions(OptionGroup):
    """Tell what it costs to hold the U-Net of a base model in fewer bits."""

    model: str | None = option(
        None, "checkpoint or diffusers folder; without it the embedded base", flag_type="path", is_positional=True
    )
    train_data_dir: str | None = option(
        None, "folder with pictures and captions (.txt); without it those of the embedded base", flag_type="path"
    )
    resolution: int = option(128, "pixels of each side, to which pictures are cut")
    max_pictures: int = option(12, "take no more pictures than these, the first by name")

    def check(self) -> list[str]:
        is_multiple = self.resolution % SIDE == 0
        return [
            *at_least(self, 1, "max_pictures"),
            *at_least(self, SIDE, "resolution"),
            *([] if is_multiple else [f"--resolution must be a multiple of {SIDE}, got {self.resolution}"]),
        ]


OPTIONS = CompareBitsOptions


def main(argv: list[str] | None = None) -> None:
    options = read_options(OPTIONS, argv)
    start_logging(LoggingOptions())
    model = options.model or str(HERE / "assets/demo_base")
    family = family_of_kind(inspect_checkpoint(model, "model"))
    captions = captions_in(Path(options.train_data_dir or HERE / "assets/demo_pictures/train"), options.max_pictures)
    with quick_imports():
        from library.recipes.base_bits import compare_forms

    for line in compare_forms(model, family, list(captions), list(captions.values()), options.resolution):
        print(line, flush=True)


def captions_in(folder: Path, max_pictures: int) -> dict[Path, str]:
    """Pictures with their captions; UserError where there are none."""
    pairs = ((picture, caption_path(picture, ".txt")) for picture in find_pictures(folder, recursive=True))
    known = [(picture, caption) for picture, caption in pairs if caption.is_file()][:max_pictures]
    if not known:
        raise UserError(f"--train_data_dir: {folder} has no pictures with captions beside them (.txt)")
    texts = read_captions(caption for _, caption in known)
    return {picture: texts[caption] for picture, caption in known}


if __name__ == "__main__":
    run_script(main)
