"""Find pictures that are in a folder more than once: the same bytes, or nearly the same look at any size.

python tools/find_duplicates.py --src_dir photos --sheet duplicates.png --move_to duplicates
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.errors import run_script
from library.logs import start_logging
from library.options.checks import at_least, at_most
from library.options.cli import read_options
from library.options.fields import REQUIRED, OptionGroup, option
from library.options.groups import LoggingOptions
from library.preparing.options import check_sheet


@dataclass(frozen=True, kw_only=True)
class FindDuplicatesOptions(OptionGroup):
    """Find pictures that are there more than once"""

    src_dir: str = option(REQUIRED, "folder of pictures", flag_type="path")
    exact: bool = option(False, "find only files with the same bytes")
    max_bits: int = option(
        6, "how different pictures that count as one may look: bits of 64 that differ, which are 0 to 5 in most copies"
    )
    move_to: str | None = option(
        None, "move all but the largest of each group to this folder, with their captions", flag_type="path"
    )
    sheet: str | None = option(None, "PNG file for a sheet of the groups", flag_type="path")

    def check(self) -> list[str]:
        return at_least(self, 0, "max_bits") + at_most(self, 16, "max_bits") + check_sheet(self.sheet)


OPTIONS = FindDuplicatesOptions


def main(argv: list[str] | None = None) -> None:
    start_logging(LoggingOptions())
    options = read_options(OPTIONS, argv)
    from library.preparing.duplicates import find_duplicates  # numpy and OpenCV

    find_duplicates(options)


if __name__ == "__main__":
    run_script(main)
