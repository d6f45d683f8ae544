"""Merge LoRA and other adapter files into an SDXL checkpoint, or several LoRA files into one.

python networks/sdxl_merge_lora.py --sd_model sdxl.safetensors --models lora.safetensors --save_to new.safetensors
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.errors import run_script
from library.logs import start_logging
from library.options.cli import read_options
from library.options.groups import LoggingOptions
from networks.merge_lora import MergeIntoFlags, run_merge


@dataclass(frozen=True, kw_only=True)
class SdxlMergeLoraOptions(MergeIntoFlags):
    """Merge LoRA and other adapter files into an SDXL checkpoint, or several LoRA files into one."""


OPTIONS = SdxlMergeLoraOptions


def main(argv: list[str] | None = None) -> None:
    options = read_options(OPTIONS, argv)
    start_logging(LoggingOptions())
    run_merge(options)


if __name__ == "__main__":
    run_script(main)
