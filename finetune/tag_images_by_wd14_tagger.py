"""Where kohya's users look for it: tools/tag_images_by_wd14_tagger.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.errors import run_script
from tools.tag_images_by_wd14_tagger import TagOptions, main

OPTIONS = TagOptions

if __name__ == "__main__":
    run_script(main)
