"""Gather the caption files of pictures in one metadata file, which --in_json of the training scripts reads.

python tools/merge_captions_to_metadata.py pictures metadata.json --caption_extension .txt
"""

import logging
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.captioning.listing import caption_path, find_pictures, folder_problems, read_captions
from library.captioning.metadata import json_problems, read_metadata, require_any, source_of, write_metadata
from library.errors import counted, one_line, run_script
from library.logs import start_logging
from library.options.cli import read_options
from library.options.derived import caption_extension
from library.options.fields import REQUIRED, OptionGroup, option
from library.options.groups import LoggingOptions

logger = logging.getLogger("merge_captions_to_metadata")


@dataclass(frozen=True, kw_only=True)
class MergeOptions(OptionGroup):
    """Gather the caption files of pictures in one metadata file."""

    train_data_dir: str = option(REQUIRED, "folder of pictures", flag_type="path", is_positional=True)
    out_json: str = option(REQUIRED, "metadata file to write, .json or .jsonl", flag_type="path", is_positional=True)
    in_json: str | None = option(
        None, "metadata file whose entries are kept; out_json where it is there already", flag_type="path"
    )
    caption_extention: str | None = option(None, "older spelling of --caption_extension")
    caption_extension: str = option(".caption", "ending of the caption files")
    full_path: bool = option(False, "name pictures by their whole paths, not by those below train_data_dir")
    recursive: bool = option(False, "take the pictures in folders of the folder too")
    debug: bool = option(False, "print each caption")

    def check(self) -> list[str]:
        return [*folder_problems(self.train_data_dir), *json_problems(self.in_json, self.out_json, "--in_json")]


OPTIONS = MergeOptions


def main(argv: list[str] | None = None) -> None:
    merge(read_options(OPTIONS, argv), "caption")


def merge(options: MergeOptions, name: str) -> None:
    """Put the caption file of every picture into its entry, under a name."""
    start_logging(LoggingOptions())
    folder, extension = Path(options.train_data_dir), caption_extension(options)
    source = source_of(options.in_json, options.out_json)
    metadata = read_metadata(source, folder, options.full_path)
    if source:
        logger.info("%s: %s kept", source, counted(len(metadata.entries), "entry", "entries"))
    path_of = {picture: caption_path(picture, extension) for picture in find_pictures(folder, options.recursive)}
    found = {picture: path for picture, path in path_of.items() if path.is_file()}
    require_any(len(found), extension, folder)
    texts = read_captions(found.values())
    for picture, path in found.items():
        metadata.entry_of(picture)[name] = texts[path]
        if options.debug:
            print(one_line(f"{metadata.key_of(picture)}: {texts[path]}"))
    if lacking := len(path_of) - len(found):
        logger.warning("%s without a %s file", counted(lacking, "picture"), extension)
    write_metadata(Path(options.out_json), metadata.entries)
    total = counted(len(metadata.entries), "entry", "entries")
    print(f"{name} of {counted(len(found), 'picture')} in {options.out_json}, of {total}")


if __name__ == "__main__":
    run_script(main)
