"""Encode the captions of an SDXL training run into files beside its pictures, which spares the run the encoders.

python tools/cache_text_encoder_outputs.py --config_file my_lora.toml
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.errors import counted, run_script
from library.options.caching import CachingOptions
from tools.cache_latents import fill, read_caching_options

OPTIONS = CachingOptions


def main(argv: list[str] | None = None) -> None:
    options = read_caching_options(argv, "--cache_text_encoder_outputs_to_disk")
    checked = fill(replace(options, cache_latents=False, cache_latents_to_disk=False))
    print(f"the text encoder outputs of {counted(checked.num_pictures, 'picture')} are on disk")


if __name__ == "__main__":
    run_script(main)
