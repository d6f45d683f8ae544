"""Merge LoRA and other adapter files into a Stable Diffusion checkpoint, or several LoRA files into one.

python networks/merge_lora.py --sd_model model.safetensors --models a.safetensors --ratios 0.8 --save_to b.safetensors
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.adapters.flags import (
    NETWORK_SUFFIXES,
    MergeFlags,
    output_problems,
    ratios_of,
    tell_replaced,
    warn_of_flags_without_effect,
)
from library.errors import run_script
from library.logs import start_logging
from library.options.checks import existing_file
from library.options.cli import read_options
from library.options.fields import option
from library.options.groups import LoggingOptions


@dataclass(frozen=True, kw_only=True)
class MergeIntoFlags(MergeFlags):
    """What is merged, and into what."""

    sd_model: str | None = option(
        None, "a checkpoint or a diffusers folder; without it the files are merged into one LoRA", flag_type="path"
    )
    concat: bool = option(False, "keep every LoRA exactly: ranks add up; otherwise the largest rank is kept")
    shuffle: bool = option(False, "put the ranks of the merged LoRA into a random order")

    def check(self) -> list[str]:
        is_folder = bool(self.sd_model) and os.path.isdir(self.sd_model)
        problems = [] if is_folder else existing_file("sd_model", self.sd_model)
        suffixes = () if is_folder else (".safetensors",) if self.sd_model else NETWORK_SUFFIXES
        return problems + output_problems(self.save_to, [self.sd_model, *(self.models or [])], suffixes)


@dataclass(frozen=True, kw_only=True)
class MergeLoraOptions(MergeIntoFlags):
    """Merge LoRA and other adapter files into a checkpoint, or several LoRA files into one."""

    v2: bool = option(False, "has no effect: the files tell which model they are of")


OPTIONS = MergeLoraOptions


def main(argv: list[str] | None = None) -> None:
    options = read_options(OPTIONS, argv)
    start_logging(LoggingOptions())
    run_merge(options)


def run_merge(options: MergeIntoFlags) -> None:
    """Merge as the options say; the same for SDXL."""
    from library.adapters import merge_jobs

    tell_replaced(options.save_to)
    warn_of_flags_without_effect(options)
    adapters = merge_jobs.open_all(ratios_of(options))
    if options.sd_model:
        merge_jobs.warn_of_flags_for_loras(options.concat, options.shuffle)
        merge_jobs.merge_into_model(options, options.sd_model, adapters)
    else:
        merge_jobs.merge_into_lora(options, adapters, options.concat, options.shuffle)


if __name__ == "__main__":
    run_script(main)
