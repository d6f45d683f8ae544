"""Caption pictures with a GIT model; tools/make_captions.py does the same with any, and has more to set.

python finetune/make_captions_by_git.py --model_id git-large-textcaps pictures/10_cat
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.errors import run_script
from library.importing import quick_imports
from library.logs import start_logging
from library.options.cli import read_options
from library.options.fields import REQUIRED, option
from library.options.groups import LoggingOptions
from tools.make_captions import CaptioningOptions, caption_pictures, model_problems, pictures_to_caption


@dataclass(frozen=True, kw_only=True)
class GitOptions(CaptioningOptions):
    """Caption pictures with a GIT model."""

    model_id: str = option(REQUIRED, "folder of the captioning model, as transformers saves it")
    max_length: int = option(50, "most tokens of a caption")

    def check(self) -> list[str]:
        return model_problems("--model_id", self.model_id)


OPTIONS = GitOptions


def main(argv: list[str] | None = None) -> None:
    start_logging(LoggingOptions())
    options = read_options(OPTIONS, argv)
    if pictures := pictures_to_caption(options):
        with quick_imports():
            from library.captioning.captioner import Captioner, Wording  # torch and transformers

        wording = Wording(prompt=options.prompt, max_tokens=options.max_length)
        caption_pictures(options, pictures, Captioner(Path(options.model_id), wording, "--model_id"))


if __name__ == "__main__":
    run_script(main)
