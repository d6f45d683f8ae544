"""Split a DyLoRA file into plain LoRA files, one for every rank that it was trained for.

python networks/extract_lora_from_dylora.py --model dylora.safetensors --unit 4 --save_to split.safetensors
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.adapters.flags import NETWORK_SUFFIXES, output_problems
from library.errors import run_script
from library.logs import start_logging
from library.options.checks import above_zero, existing_file
from library.options.cli import read_options
from library.options.fields import REQUIRED, OptionGroup, option
from library.options.groups import LoggingOptions


@dataclass(frozen=True, kw_only=True)
class ExtractDyloraOptions(OptionGroup):
    """Split a DyLoRA file into plain LoRA files, one for every rank that it was trained for."""

    model: str = option(REQUIRED, "the DyLoRA file", flag_type="path")
    unit: int = option(REQUIRED, "the unit that it was trained with: ranks are its multiples")
    save_to: str = option(REQUIRED, "the files to write: the rank is put before the ending", flag_type="path")

    def check(self) -> list[str]:
        problems = existing_file("model", self.model) + above_zero(self, "unit")
        return problems + output_problems(self.save_to, [self.model], NETWORK_SUFFIXES)


OPTIONS = ExtractDyloraOptions


def main(argv: list[str] | None = None) -> None:
    options = read_options(OPTIONS, argv)
    start_logging(LoggingOptions())
    from library.adapters.dylora import split_by_rank

    for path in split_by_rank(Path(options.model), options.unit, Path(options.save_to)):
        print(f"wrote {path}")


if __name__ == "__main__":
    run_script(main)
