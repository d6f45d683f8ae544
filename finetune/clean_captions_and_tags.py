"""Clean the captions and tags of a metadata file; tools/clean_captions.py does it for caption files, by rules.

python finetune/clean_captions_and_tags.py metadata.json cleaned.json
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.captioning.cleaning import Rules, clean_sentence, clean_text, read_rules
from library.captioning.metadata import json_problems, write_metadata
from library.dataset.metadata_file import read_entries
from library.errors import counted, one_line, run_script
from library.options.checks import existing_file
from library.options.cli import read_options
from library.options.fields import REQUIRED, OptionGroup, option


@dataclass(frozen=True, kw_only=True)
class CleanMetadataOptions(OptionGroup):
    """Clean the captions and tags of a metadata file."""

    in_json: str = option(REQUIRED, "metadata file, .json or .jsonl", flag_type="path", is_positional=True)
    out_json: str = option(REQUIRED, "file for what was cleaned", flag_type="path", is_positional=True)
    rules: str | None = option(None, "TOML file of rules for the tags, see docs/tools.md", flag_type="path")
    debug: bool = option(False, "print what changes")

    def check(self) -> list[str]:
        return [*json_problems(self.in_json, self.out_json, "in_json"), *existing_file("rules", self.rules)]


OPTIONS = CleanMetadataOptions


def main(argv: list[str] | None = None) -> None:
    options = read_options(OPTIONS, argv)
    rules = read_rules(Path(options.rules)) if options.rules else Rules()
    entries = read_entries(Path(options.in_json))
    num_changed = 0
    for key, entry in entries.items():
        cleaned = {}
        if entry.get("tags"):
            cleaned["tags"] = clean_text(entry["tags"], rules)
        if entry.get("caption"):
            cleaned["caption"] = "\n".join(map(clean_sentence, entry["caption"].splitlines()))
        changes = {name: text for name, text in cleaned.items() if text != entry[name]}
        if options.debug:
            print(*(one_line(f"{key}: {name}: {entry[name]} -> {text}") for name, text in changes.items()), sep="\n")
        entry.update(changes)
        num_changed += bool(changes)
    write_metadata(Path(options.out_json), entries)
    print(f"{num_changed} of {counted(len(entries), 'entry', 'entries')} changed")


if __name__ == "__main__":
    run_script(main)
