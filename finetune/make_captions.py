"""Where kohya's users look for it: tools/make_captions.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.errors import run_script
from tools.make_captions import MakeCaptionsOptions, main

OPTIONS = MakeCaptionsOptions

if __name__ == "__main__":
    run_script(main)
