"""Show which words of the vocabulary a LoRA's text encoder part changes most, which are likely its trigger words.

python networks/lora_interrogator.py --sd_model base.safetensors --model my_lora.safetensors
"""

import logging
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.errors import run_script
from library.logs import start_logging
from library.options.checks import above_zero, existing_file
from library.options.cli import read_options
from library.options.fields import REQUIRED, OptionGroup, option
from library.options.groups import LoggingOptions, ModelOptions

logger = logging.getLogger(__name__)

NUM_SHOWN = 50


@dataclass(frozen=True, kw_only=True)
class LoraInterrogatorOptions(OptionGroup):
    """Show which words of the vocabulary a LoRA's text encoder part changes most."""

    v2: bool = option(False, "no effect: the model's file tells what it is")
    sd_model: str = option(REQUIRED, "the base model: a checkpoint or a diffusers folder")
    model: str = option(REQUIRED, "the LoRA or other adapter file")
    batch_size: int = option(16, "tokens encoded together")
    clip_skip: int | None = option(None, "as in training; not for SDXL, which has its own")

    def check(self) -> list[str]:
        return existing_file("model", self.model) + above_zero(self, "batch_size", "clip_skip")


OPTIONS = LoraInterrogatorOptions


def main(argv: list[str] | None = None) -> None:
    options = read_options(OPTIONS, argv)
    start_logging(LoggingOptions())
    if options.v2:
        logger.warning("--v2 has no effect: the model's file tells what it is")
    from library.adapters.interrogation import effects_of_tokens

    model = ModelOptions(pretrained_model_name_or_path=options.sd_model, clip_skip=options.clip_skip)
    effects = effects_of_tokens(model, Path(options.model), options.batch_size)
    mean = sum(effect.change for effect in effects) / len(effects)
    print(f"mean change of a token: {mean:.4g}; the {NUM_SHOWN} that change most:")
    for effect in effects[:NUM_SHOWN]:
        print(f"{effect.change:.4g}  {effect.token:>5}  {effect.text}")


if __name__ == "__main__":
    run_script(main)
