"""Change what a safetensors file says of itself, before it is shared: title, author, trigger words, cover, privacy.

python tools/edit_metadata.py --model my_lora.safetensors --title "My style" --trigger_words mystyle --strip captions
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.adapters.metadata import LEVELS, stripped, write_with_metadata
from library.errors import UserError, counted, run_script
from library.options.cli import read_options
from library.options.fields import REQUIRED, OptionGroup, option
from library.safetensors_header import read_header

FIELDS = {  # by option: the fields that it sets, of the model specification and of the editors of the WebUI
    "title": ("modelspec.title", "ssmd_display_name"),
    "description": ("modelspec.description", "ssmd_description"),
    "author": ("modelspec.author", "ssmd_author"),
    "license": ("modelspec.license",),
    "tags": ("modelspec.tags", "ssmd_tags"),
    "trigger_words": ("modelspec.trigger_phrase", "ssmd_keywords"),
}


@dataclass(frozen=True, kw_only=True)
class EditMetadataOptions(OptionGroup):
    """Change the metadata of a safetensors file."""

    model: str = option(REQUIRED, "a .safetensors file", flag_type="path")
    output: str | None = option(None, "the file to write; without it --model itself is changed", flag_type="path")
    overwrite: bool = option(False, "replace --output where it is there")
    title: str | None = option(None, "the name that programs show")
    description: str | None = option(None, "what it is and how to use it")
    author: str | None = option(None, "who made it")
    license: str | None = option(None, "what others may do with it")
    tags: str | None = option(None, "what it is about, separated by commas")
    trigger_words: str | None = option(None, "what a prompt must have, separated by commas")
    cover_images: list[str] | None = option(None, "pictures that stand for the file; the first is shown")
    set: list[str] | None = option(None, "further fields, each as KEY=VALUE")
    remove: list[str] | None = option(None, "fields to remove, by their keys")
    strip: str | None = option(
        None,
        "before all else remove: captions and their tags; all that tells of the dataset; of the training; or all",
        choices=LEVELS,
    )

    def check(self) -> list[str]:
        problems = [f"--set must be KEY=VALUE, got {text!r}" for text in self.set or [] if text.find("=") < 1]
        if not Path(self.model).is_file():
            problems.append(f"--model: there is no file {self.model}")
        for name in ("model", "output"):
            path = getattr(self, name)
            if path and Path(path).suffix.lower() != ".safetensors":
                problems.append(f"--{name}: {path} is not a .safetensors file; only those have metadata")
        if self.output and Path(self.output).exists() and not self.overwrite:
            problems.append(f"--output: {self.output} is there already; --overwrite replaces it")
        missing = [path for path in self.cover_images or [] if not Path(path).is_file()]
        return problems + [f"--cover_images: there is no file {path}" for path in missing]


OPTIONS = EditMetadataOptions


def main(argv: list[str] | None = None) -> None:
    options = read_options(OPTIONS, argv)
    source, target = Path(options.model), Path(options.output or options.model)
    before = read_header(source, "--model").metadata
    after = edited(before, options)
    write_with_metadata(source, target, after)
    after = read_header(target, "--output").metadata
    changed = sum(before.get(name) != value for name, value in after.items())
    print(
        f"{target}: {counted(changed, 'field')} set, {len(before.keys() - after.keys())} removed, {len(after)} in all"
    )


def edited(metadata: dict[str, str], options: EditMetadataOptions) -> dict[str, str]:
    """Metadata with what the options change."""
    edited = stripped(metadata, options.strip) if options.strip else dict(metadata)
    unknown = [name for name in options.remove or [] if name not in metadata]
    if unknown:
        raise UserError(f"--remove: {options.model} has no field {unknown[0]}; tools/show_metadata.py lists them")
    for name in options.remove or []:
        edited.pop(name, None)
    new = {key: getattr(options, name) for name, keys in FIELDS.items() for key in keys}
    new |= dict(text.split("=", 1) for text in options.set or [])
    if options.cover_images:
        new["ssmd_cover_images"] = _covers(options.cover_images)
    return edited | {name: value for name, value in new.items() if value is not None}


def _covers(paths: list[str]) -> str:
    """The field of the cover pictures."""
    from library.adapters.covers import cover_image
    from library.dataset.picture_files import unreadable_reason

    covers = []
    for path in paths:
        try:
            covers.append(cover_image(Path(path)))
        except Exception as error:  # Pillow has many for damaged pictures
            raise UserError(f"--cover_images: {path}: {unreadable_reason(path, error)}") from error
    return json.dumps(covers)


if __name__ == "__main__":
    run_script(main)
