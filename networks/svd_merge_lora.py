"""Merge adapter files of any kind and rank into one LoRA: the closest of the ranks that are asked for.

python networks/svd_merge_lora.py --models a.safetensors b.safetensors --new_rank 32 --save_to c.safetensors
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.adapters.flags import (
    NETWORK_SUFFIXES,
    MergeFlags,
    RankFlags,
    output_problems,
    ratios_of,
    tell_replaced,
    warn_of_flags_without_effect,
)
from library.errors import run_script
from library.logs import start_logging
from library.options.cli import read_options
from library.options.fields import option
from library.options.groups import LoggingOptions


@dataclass(frozen=True, kw_only=True)
class SvdMergeLoraOptions(MergeFlags, RankFlags):
    """Merge adapter files of any kind and rank into one LoRA of the closest change."""

    sd_model: str | None = option(
        None, "the model that they were trained on, which files with OFT, DoRA, GLoRA or (IA)^3 need", flag_type="path"
    )

    def check(self) -> list[str]:
        return output_problems(self.save_to, self.models or [], NETWORK_SUFFIXES)


OPTIONS = SvdMergeLoraOptions


def main(argv: list[str] | None = None) -> None:
    options = read_options(OPTIONS, argv)
    start_logging(LoggingOptions())
    from library.adapters import merge_jobs

    tell_replaced(options.save_to)
    warn_of_flags_without_effect(options)
    adapters = merge_jobs.open_all(ratios_of(options))
    merge_jobs.merge_by_svd(options, options, adapters, options.sd_model)


if __name__ == "__main__":
    run_script(main)
