"""Extract a LoRA from what makes a model differ from another, or from an adapter file of another kind.

python networks/extract_lora_from_models.py --model_org a.safetensors --model_tuned b.safetensors --save_to c.pt
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.adapters.flags import (
    NETWORK_SUFFIXES,
    PRECISIONS,
    SaveFlags,
    output_problems,
    tell_replaced,
    warn_of_flags_without_effect,
)
from library.errors import run_script
from library.logs import start_logging
from library.options.checks import above_zero, at_least
from library.options.cli import read_options
from library.options.fields import REQUIRED, option
from library.options.groups import LoggingOptions


@dataclass(frozen=True, kw_only=True)
class ExtractLoraOptions(SaveFlags):
    """Extract a LoRA from the difference of two models, or from a LoCon, LoHa, LoKr, DoRA or other adapter file."""

    model_org: str = option(REQUIRED, "the model before training: a checkpoint or a diffusers folder", flag_type="path")
    model_tuned: str = option(
        REQUIRED, "the trained model, or an adapter file that was trained on it", flag_type="path"
    )
    dim: int = option(4, "rank of Linear layers and 1x1 convolutions")
    conv_dim: int | None = option(None, "rank of other convolutions, which are left alone without it")
    device: str | None = option(None, 'where to compute, such as "cuda"; the processor unless given')
    clamp_quantile: float = option(
        0.99, "cut factors off at this quantile of their sizes; done only where the flag is given"
    )
    min_diff: float = option(0.01, "leave the text encoders out where none of their weights differ by more than this")
    no_metadata: bool = option(False, "write only what a program must know to load the file")
    v2: bool = option(False, "has no effect: the models tell which version they are")
    sdxl: bool = option(False, "has no effect: the models tell which version they are")
    v_parameterization: bool | None = option(
        None, "say in the metadata that the model predicts velocity; that of SD 2.x always does"
    )
    load_precision: str | None = option(None, "has no effect: weights are compared in float32", choices=PRECISIONS)
    load_original_model_to: str | None = option(None, "has no effect: weights are read layer by layer")
    load_tuned_model_to: str | None = option(None, "has no effect: weights are read layer by layer")

    def check(self) -> list[str]:
        problems = [
            f"--{name}: there is no file or folder {path}"
            for name in ("model_org", "model_tuned")
            if not os.path.exists(path := getattr(self, name))
        ]
        if not 0 < self.clamp_quantile <= 1:
            problems.append(f"--clamp_quantile must be above 0 and at most 1, got {self.clamp_quantile}")
        problems += above_zero(self, "dim", "conv_dim") + at_least(self, 0, "min_diff")
        return problems + output_problems(self.save_to, [self.model_org, self.model_tuned], NETWORK_SUFFIXES)


OPTIONS = ExtractLoraOptions


def main(argv: list[str] | None = None) -> None:
    options = read_options(OPTIONS, argv)
    start_logging(LoggingOptions())
    from library.adapters.extracting import Extraction, extract

    tell_replaced(options.save_to)
    warn_of_flags_without_effect(options)
    how = Extraction(
        dim=options.dim,
        conv_dim=options.conv_dim,
        device=options.device,
        clamp_quantile=options.clamp_quantile if "clamp_quantile" in options.sources else None,
        min_diff=options.min_diff,
        predicts_v=options.v_parameterization,
        with_modelspec=not options.no_metadata,
    )
    extract(options.model_org, options.model_tuned, Path(options.save_to), options.save_precision, how)


if __name__ == "__main__":
    run_script(main)
