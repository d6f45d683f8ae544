"""Caption pictures with a model of transformers in a local folder: BLIP, BLIP-2, GIT, Florence-2, and others.

python tools/make_captions.py --caption_weights blip-image-captioning-large pictures/10_cat
"""

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.captioning.cleaning import without_lettering
from library.captioning.listing import find_pictures, folder_problems
from library.captioning.sinks import CaptionFiles
from library.errors import UserError, counted, one_line, quoted_list, run_script
from library.importing import quick_imports
from library.logs import start_logging
from library.options.checks import above_zero, at_least, at_most
from library.options.cli import read_options
from library.options.derived import with_dot
from library.options.fields import REQUIRED, OptionGroup, option
from library.options.groups import LoggingOptions

if TYPE_CHECKING:
    from library.captioning.captioner import Captioner

logger = logging.getLogger("make_captions")


@dataclass(frozen=True, kw_only=True)
class CaptioningOptions(OptionGroup):
    """Pictures and their captions"""

    train_data_dir: str = option(REQUIRED, "folder of pictures", flag_type="path", is_positional=True)
    caption_extension: str = option(".caption", "ending of the caption files")
    overwrite: bool = option(False, "caption pictures that have a caption already, and replace it")
    prompt: str | None = option(
        None, "what the model is asked: a question, a task of Florence-2, or with BLIP the first words of the caption"
    )
    caption_prefix: str = option("", "text before each caption")
    caption_suffix: str = option("", "text behind each caption")
    remove_words: bool = option(False, "leave out what captions say of lettering, as 'with the words ...'")
    batch_size: int = option(1, "pictures that the model sees at once")
    max_data_loader_n_workers: int | None = option(None, "threads that read pictures; as many as cores when not given")
    recursive: bool = option(False, "take the pictures in folders of the folder too")
    debug: bool = option(False, "print each caption")

    def check(self) -> list[str]:
        counts = at_least(self, 1, "batch_size", "max_data_loader_n_workers", "max_length")
        return [*folder_problems(self.train_data_dir), *counts]


@dataclass(frozen=True, kw_only=True)
class MakeCaptionsOptions(CaptioningOptions):
    """Caption pictures with a model of transformers."""

    caption_weights: str = option(REQUIRED, "folder of the captioning model, as transformers saves it")
    caption_extention: str | None = option(None, "older spelling of --caption_extension")
    beam_search: bool = option(False, "search for the likeliest caption instead of drawing one")
    num_beams: int = option(1, "captions that --beam_search follows at once")
    top_p: float = option(0.9, "without --beam_search: words are drawn from the likeliest that have this probability")
    max_length: int = option(75, "most tokens of a caption")
    min_length: int = option(5, "least tokens of a caption")
    seed: int = option(42, "seed of what is drawn")

    def check(self) -> list[str]:
        return [
            *model_problems("--caption_weights", self.caption_weights),
            *at_least(self, 1, "num_beams"),
            *at_least(self, 0, "min_length", "seed"),
            *above_zero(self, "top_p"),
            *at_most(self, 1, "top_p"),
            *at_most(self, self.max_length, "min_length"),
        ]


OPTIONS = MakeCaptionsOptions


def main(argv: list[str] | None = None) -> None:
    start_logging(LoggingOptions())
    options = read_options(OPTIONS, argv)
    if not options.beam_search and options.num_beams > 1:
        logger.warning("--num_beams has no effect without --beam_search")
    pictures = pictures_to_caption(options)
    if not pictures:
        return
    with quick_imports():
        from library.captioning.captioner import Captioner, Wording  # torch and transformers

    wording = Wording(
        prompt=options.prompt,
        num_beams=options.num_beams,
        top_p=None if options.beam_search else options.top_p,
        max_tokens=options.max_length,
        min_tokens=options.min_length,
        seed=options.seed,
    )
    caption_pictures(options, pictures, Captioner(Path(options.caption_weights), wording, "--caption_weights"))


def model_problems(label: str, model: str) -> list[str]:
    """A sentence where a captioning model is not a folder of this computer."""
    if (Path(model) / "config.json").is_file():
        return []
    given = f"{model} is no folder with a config.json" if Path(model).is_dir() else f"there is no folder {model}"
    return [f"{label}: {given}; nothing is downloaded here: give the folder of a model that transformers reads"]


def files_of(options: CaptioningOptions, pictures: list[Path]) -> CaptionFiles:
    """Where captions go."""
    older = getattr(options, "caption_extention", None)  # which not every script has
    return CaptionFiles(with_dot(older or options.caption_extension), pictures)


def pictures_to_caption(options: CaptioningOptions) -> list[Path]:
    """The pictures that have no caption yet, or with --overwrite all."""
    pictures = find_pictures(Path(options.train_data_dir), options.recursive)
    files = files_of(options, pictures)
    waiting = pictures if options.overwrite else [picture for picture in pictures if not files.has(picture)]
    if done := len(pictures) - len(waiting):
        logger.info("%d of %d have captions already; --overwrite makes them anew", done, len(pictures))
    return waiting


def caption_pictures(options: CaptioningOptions, pictures: list[Path], captioner: "Captioner") -> None:
    """Write a caption for each of the pictures."""
    from PIL import Image
    from tqdm import tqdm

    from library.captioning.batches import read_in_batches
    from library.dataset.images import load_image

    def read(picture: Path) -> Image.Image:
        return Image.fromarray(load_image(picture))

    files, damaged = files_of(options, pictures), []
    logger.info("%s model on %s", captioner.kind, captioner.device)
    batches = read_in_batches(pictures, read, options.batch_size, options.max_data_loader_n_workers, damaged)
    with tqdm(total=len(pictures), desc="captioning", unit="pictures") as bar:
        for batch in batches:
            captions = captioner.captions([image for _, image in batch], [picture.name for picture, _ in batch])
            for (picture, image), caption in zip(batch, captions, strict=True):
                caption = without_lettering(caption) if options.remove_words else caption
                caption = f"{options.caption_prefix}{caption}{options.caption_suffix}"
                files.write(picture, caption, image.size)
                if options.debug:
                    bar.write(one_line(f"{picture}: {caption}"))
            bar.update(len(batch))
    print(f"captioned {counted(len(pictures) - len(damaged), 'picture')}")
    if damaged:
        raise UserError(f"pictures that cannot be read have no captions: {quoted_list(damaged)}")


if __name__ == "__main__":
    run_script(main)
