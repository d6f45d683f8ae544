"""Make a LoRA of smaller ranks: the closest to what a LoRA or another adapter file does.

python networks/resize_lora.py --model lora.safetensors --new_rank 16 --save_to small.safetensors
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.adapters.flags import NETWORK_SUFFIXES, RankFlags, SaveFlags, output_problems, tell_replaced
from library.errors import run_script
from library.logs import start_logging
from library.options.checks import existing_file
from library.options.cli import read_options
from library.options.fields import REQUIRED, option
from library.options.groups import LoggingOptions

METHODS = ("sv_ratio", "sv_fro", "sv_cumulative")


@dataclass(frozen=True, kw_only=True)
class ResizeLoraOptions(SaveFlags, RankFlags):
    """Make a LoRA of smaller ranks, the closest to what a LoRA or another adapter file does."""

    model: str = option(REQUIRED, "the file to resize", flag_type="path")
    dynamic_method: str | None = option(
        None,
        "choose each layer's rank by its singular values: those above the largest / --dynamic_param (sv_ratio), or as "
        "many as keep this share of their Frobenius norm (sv_fro) or of their sum (sv_cumulative)",
        choices=METHODS,
    )
    dynamic_param: float | None = option(None, "the number for --dynamic_method")
    verbose: bool = option(False, "say for each layer which rank it gets and what is lost")
    sd_model: str | None = option(
        None, "the model that it was trained on, which files with OFT, DoRA, GLoRA or (IA)^3 need", flag_type="path"
    )

    def check(self) -> list[str]:
        problems = existing_file("model", self.model) + output_problems(self.save_to, [self.model], NETWORK_SUFFIXES)
        if (self.dynamic_method is None) != (self.dynamic_param is None):
            problems.append("--dynamic_method and --dynamic_param must be given together")
        elif self.dynamic_method == "sv_ratio" and self.dynamic_param < 2:
            problems.append(f"--dynamic_param must be at least 2 for sv_ratio, got {self.dynamic_param}")
        elif self.dynamic_method not in (None, "sv_ratio") and not 0 < self.dynamic_param <= 1:
            problems.append(
                f"--dynamic_param must be above 0 and at most 1 for {self.dynamic_method}, got {self.dynamic_param}"
            )
        return problems


OPTIONS = ResizeLoraOptions


def main(argv: list[str] | None = None) -> None:
    options = read_options(OPTIONS, argv)
    start_logging(LoggingOptions())
    from library.adapters.resizing import Resizing, resize

    tell_replaced(options.save_to)
    how = Resizing(options, options.dynamic_method, options.dynamic_param, options.sd_model, options.verbose)
    resize(Path(options.model), Path(options.save_to), options.save_precision, how)


if __name__ == "__main__":
    run_script(main)
