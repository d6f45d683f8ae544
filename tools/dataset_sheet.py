"""Draw a picture of a dataset: its buckets with all pictures as training sees them, captions, counts, what is doubtful.

python tools/dataset_sheet.py --config_file my_lora.toml
python tools/dataset_sheet.py --train_data_dir dataset --resolution 512 --enable_bucket --html dataset.html
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.errors import run_script
from library.logs import start_logging
from library.options.checks import at_least, at_most
from library.options.cli import read_options
from library.options.fields import OptionGroup, option
from library.options.groups import LoggingOptions, TrainNetworkOptions
from library.options.places import problems_in_place
from library.preparing.options import check_sheet


@dataclass(frozen=True, kw_only=True)
class SheetOptions(OptionGroup):
    """The sheet"""

    html: str | None = option(
        None, "page to write; without it and --png both go to --output_dir, as NAME-sheet", flag_type="path"
    )
    png: str | None = option(None, "PNG file to write, or several where one would be too large", flag_type="path")
    thumbnail: int = option(192, "longest side of a picture on the sheet, in pixels")

    def check(self) -> list[str]:
        problems = at_least(self, 32, "thumbnail") + at_most(self, 1024, "thumbnail") + check_sheet(self.png, "--png")
        if self.html and not self.html.lower().endswith((".html", ".htm")):
            problems.append(f"--html must be an .html file, got {self.html}")
        return problems


@dataclass(frozen=True, kw_only=True)
class DatasetSheetOptions(SheetOptions, TrainNetworkOptions):
    """Draw a picture of the dataset that these options of training describe; nothing is trained"""

    def _check_model(self) -> list[str]:
        return []  # none is loaded

    def _check_output_dir(self) -> list[str]:
        return super()._check_output_dir() if self.output_dir else []


OPTIONS = DatasetSheetOptions


def main(argv: list[str] | None = None) -> None:
    start_logging(LoggingOptions())
    options = read_options(OPTIONS, argv)
    from library.recipes.dataset_page import write_dataset_sheet  # numpy and OpenCV

    with problems_in_place(options):
        write_dataset_sheet(options)


if __name__ == "__main__":
    run_script(main)
