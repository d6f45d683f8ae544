"""Where kohya's users look for it: tools/prepare_buckets_latents.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.errors import run_script
from tools.prepare_buckets_latents import PrepareOptions, main

OPTIONS = PrepareOptions

if __name__ == "__main__":
    run_script(main)
