"""Put caption files of tags in order by rules: spelling, duplicates, synonyms, fixed traits of the subject.

python tools/clean_captions.py --rules rules.toml --dry_run pictures/10_cat
"""

import logging
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.captioning.cleaning import Rules, clean_text, read_rules
from library.captioning.listing import caption_path, find_pictures, folder_problems, read_captions
from library.captioning.metadata import require_any
from library.errors import counted, one_line, run_script
from library.files import write_text_whole
from library.logs import start_logging
from library.options.checks import existing_file
from library.options.cli import read_options
from library.options.derived import with_dot
from library.options.fields import REQUIRED, OptionGroup, option
from library.options.groups import LoggingOptions

logger = logging.getLogger("clean_captions")

BACKUP = ".captions_before_cleaning"  # a folder whose name begins with a dot is no folder of pictures


@dataclass(frozen=True, kw_only=True)
class CleanCaptionsOptions(OptionGroup):
    """Put caption files of tags in order by rules."""

    train_data_dir: str = option(REQUIRED, "folder of pictures with captions", flag_type="path", is_positional=True)
    rules: str | None = option(None, "TOML file of rules, see docs/tools.md", flag_type="path")
    caption_extension: str = option(".txt", "ending of the caption files")
    recursive: bool = option(False, "take the pictures in folders of the folder too")
    dry_run: bool = option(False, "show what would change, and write nothing")
    no_backup: bool = option(False, f"keep no copies of the captions in {BACKUP}")

    def check(self) -> list[str]:
        return [*folder_problems(self.train_data_dir), *existing_file("rules", self.rules)]


OPTIONS = CleanCaptionsOptions


def main(argv: list[str] | None = None) -> None:
    start_logging(LoggingOptions())
    options = read_options(OPTIONS, argv)
    rules = read_rules(Path(options.rules)) if options.rules else Rules()
    folder = Path(options.train_data_dir)
    extension = with_dot(options.caption_extension)
    paths = [caption_path(picture, extension) for picture in find_pictures(folder, options.recursive)]
    paths = sorted({path for path in paths if path.is_file()})
    require_any(len(paths), extension, folder)
    old = read_captions(paths)
    new = {path: text for path, before in old.items() if (text := clean_text(before, rules)) != before}
    if options.dry_run:
        show(folder, old, new)
    else:
        write(folder, old, new, not options.no_backup)
    verb = "would change" if options.dry_run else "changed"
    print(f"{len(new)} of {counted(len(old), 'caption')} {verb}")


def show(folder: Path, old: dict[Path, str], new: dict[Path, str]) -> None:
    """Print captions as they are and as they would be."""
    for path, text in new.items():
        print(one_line(str(path.relative_to(folder))))
        print(*(f"- {one_line(line)}" for line in old[path].splitlines()), sep="\n")
        print(*(f"+ {one_line(line)}" for line in text.splitlines()), sep="\n")


def write(folder: Path, old: dict[Path, str], new: dict[Path, str], keeps_old: bool) -> None:
    """Write the changed captions, after copies of what they were."""
    backup = folder / f"{BACKUP}-{time.strftime('%Y%m%d-%H%M%S')}"
    if keeps_old and new:
        for path in new:
            write_text_whole(backup / path.relative_to(folder), f"{old[path]}\n")
        logger.info("the captions as they were are in %s", backup)
    for path, text in new.items():
        write_text_whole(path, f"{text}\n")


if __name__ == "__main__":
    run_script(main)
