"""Encode the pictures of a training run into files beside them, so that the run need not load the VAE.

python tools/cache_latents.py --config_file my_lora.toml
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.errors import counted, run_script
from library.importing import quick_imports
from library.logs import start_logging
from library.options.caching import CachingOptions
from library.options.cli import read_options
from library.options.groups import LoggingOptions
from library.options.places import problems_in_place

if TYPE_CHECKING:
    from library.caching_preflight import CachingPreflight

OPTIONS = CachingOptions


def main(argv: list[str] | None = None) -> None:
    options = read_caching_options(argv, "--cache_latents_to_disk")
    checked = fill(replace(options, cache_text_encoder_outputs_to_disk=False))
    print(f"the latents of {counted(checked.num_pictures, 'picture')} are on disk")


def read_caching_options(argv: list[str] | None, flag: str) -> CachingOptions:
    """The options, with the flag of what the script is for; --skip_existing is another word for --skip_cache_check."""
    start_logging(LoggingOptions())
    options = read_options(OPTIONS, [*(sys.argv[1:] if argv is None else argv), flag])
    start_logging(options)
    return replace(options, skip_cache_check=options.skip_cache_check or options.skip_existing)


def fill(options: CachingOptions) -> "CachingPreflight":
    """Check what the options name, then write what is missing."""
    from library.caching_preflight import caching_preflight  # all that looks at files, which --help does without

    with problems_in_place(options):
        checked = caching_preflight(options)
        with quick_imports():
            from library.recipes.caching import fill_caches  # torch, diffusers and transformers

        fill_caches(options, checked)
    return checked


if __name__ == "__main__":
    run_script(main)
