"""Gather the tag files of pictures in one metadata file, beside the captions that it has.

python finetune/merge_dd_tags_to_metadata.py pictures metadata.json
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.errors import run_script
from library.options.cli import read_options
from library.options.fields import option
from tools.merge_captions_to_metadata import MergeOptions, merge


@dataclass(frozen=True, kw_only=True)
class MergeTagsOptions(MergeOptions):
    """Gather the tag files of pictures in one metadata file."""

    caption_extension: str = option(".txt", "ending of the tag files")


OPTIONS = MergeTagsOptions


def main(argv: list[str] | None = None) -> None:
    merge(read_options(OPTIONS, argv), "tags")


if __name__ == "__main__":
    run_script(main)
