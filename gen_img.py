"""Draw pictures from prompts with a Stable Diffusion model and any number of networks.

python gen_img.py --ckpt model.safetensors --network_weights my_lora.safetensors --prompt "a cat --d 1"
"""

import json
import logging
from pathlib import Path

from library.errors import run_script
from library.generating.options import DrawOptions
from library.importing import quick_imports
from library.logs import start_logging
from library.options.cli import read_options
from library.safetensors_header import read_header

logger = logging.getLogger(__name__)

OPTIONS = DrawOptions


def main(argv: list[str] | None = None, family: str | None = None) -> None:
    """Draw; the model's family is what the checkpoint says, which has to be `family` where that is given."""
    options = read_options(OPTIONS, argv)
    start_logging(options)
    from library.generating.preparation import meaningless_options, prepare_pictures

    prepared = prepare_pictures(options, family)
    for warning in meaningless_options(options, prepared):
        logger.warning(warning)
    if options.network_show_meta:
        show_metadata(options.network_weights)
    with quick_imports():
        from library.generating.session import draw_pictures  # torch, diffusers and transformers from here on

    draw_pictures(options, prepared)


def show_metadata(paths: list[str]) -> None:
    """Print what the networks' files say of themselves."""
    for path in map(Path, paths):
        is_safetensors = path.suffix.lower() == ".safetensors"
        metadata = read_header(path, "--network_weights").metadata if is_safetensors else {}
        print(path, json.dumps(metadata, ensure_ascii=False, indent=2), flush=True)


if __name__ == "__main__":
    run_script(main)
