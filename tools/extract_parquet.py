"""Unpack a dataset of Hugging Face, as parquet files or as an imagefolder, into pictures and caption files.

python tools/extract_parquet.py train-00000-of-00001.parquet dataset/1_things
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.errors import run_script
from library.logs import start_logging
from library.options.cli import read_options
from library.options.fields import REQUIRED, OptionGroup, option
from library.options.groups import LoggingOptions
from library.preparing.options import WritingOptions


@dataclass(frozen=True, kw_only=True)
class ExtractOptions(OptionGroup):
    """What is unpacked, and where to"""

    source: str = option(
        REQUIRED, "a .parquet file, a folder of them, or a folder with metadata.jsonl or metadata.csv",
        flag_type="path", is_positional=True,
    )  # fmt: skip
    output_dir: str = option(REQUIRED, "folder for pictures and captions", flag_type="path", is_positional=True)
    image_column: str | None = option(None, "column of the pictures; found by its type when not given")
    caption_column: str | None = option(None, "column of the captions; found by type and name when not given")
    caption_extension: str = option(".txt", "ending of caption files")

    def check(self) -> list[str]:
        if self.caption_extension.startswith(".") and self.caption_extension[1:].isalnum():
            return []
        return [f"--caption_extension must be an ending such as .txt, got {self.caption_extension!r}"]


@dataclass(frozen=True, kw_only=True)
class ExtractParquetOptions(ExtractOptions, WritingOptions):
    """Unpack a dataset into pictures and caption files"""


OPTIONS = ExtractParquetOptions


def main(argv: list[str] | None = None) -> None:
    start_logging(LoggingOptions())
    options = read_options(OPTIONS, argv)
    from library.preparing.unpacking import extract  # numpy and OpenCV

    extract(options)


if __name__ == "__main__":
    run_script(main)
