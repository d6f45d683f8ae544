"""Show the metadata of a safetensors file: what a LoRA was trained with, and what a checkpoint says of itself.

python tools/show_metadata.py --model my_lora.safetensors
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.errors import UserError, run_script
from library.options.cli import read_options
from library.options.fields import REQUIRED, OptionGroup, option
from library.safetensors_header import read_header
from library.texts import read_json


@dataclass(frozen=True, kw_only=True)
class ShowMetadataOptions(OptionGroup):
    """Show the metadata of a safetensors file."""

    model: str = option(REQUIRED, "a .safetensors file", flag_type="path")

    def check(self) -> list[str]:
        path = Path(self.model)
        if not path.is_file():
            return [f"--model: there is no file {path}"]
        is_other = path.suffix.lower() != ".safetensors"
        return [f"--model: {path} is not a .safetensors file; only those have metadata"] if is_other else []


OPTIONS = ShowMetadataOptions
PICTURES = "ssmd_cover_images", "modelspec.thumbnail"  # pages of letters, which nobody reads


def main(argv: list[str] | None = None) -> None:
    options = read_options(OPTIONS, argv)
    metadata = read_header(Path(options.model), "--model").metadata
    if not metadata:
        raise UserError(f"--model: {options.model} has no metadata")
    shown = {name: _opened(value) if name not in PICTURES else _size(value) for name, value in metadata.items()}
    print(json.dumps(shown, ensure_ascii=False, indent=2))


def _size(text: str) -> str:
    return f"({len(text) / 1000:.0f} kB of pictures)"


def _opened(text: str) -> Any:
    """The object or list that a metadata value holds as JSON, or the text itself."""
    if text[:1] not in ("{", "["):
        return text
    try:
        return read_json(text)
    except json.JSONDecodeError:
        return text


if __name__ == "__main__":
    run_script(main)
