"""Where kohya's users look for it: tools/merge_captions_to_metadata.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.errors import run_script
from tools.merge_captions_to_metadata import MergeOptions, main

OPTIONS = MergeOptions

if __name__ == "__main__":
    run_script(main)
