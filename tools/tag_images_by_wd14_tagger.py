"""Tag pictures with a tagger of the WD14 kind (v2, v3, EVA02, ViT), an ONNX model in a local folder.

python tools/tag_images_by_wd14_tagger.py --model_dir wd-vit-tagger-v3 --remove_underscore pictures/10_cat
"""

import logging
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.captioning.listing import find_pictures, folder_problems
from library.captioning.metadata import suffix_problems
from library.captioning.sinks import CaptionFiles, MetadataFile, Sink
from library.captioning.spelling import comparable
from library.errors import UserError, counted, one_line, quoted_list, run_script
from library.logs import start_logging
from library.options.checks import at_least, conflict, shares
from library.options.cli import read_options
from library.options.derived import caption_extension
from library.options.fields import REQUIRED, OptionGroup, option
from library.options.groups import LoggingOptions

if TYPE_CHECKING:
    from library.captioning.tagger import Tagger
    from library.captioning.tags import TagRules, TagWriter

logger = logging.getLogger("tag_images_by_wd14_tagger")

THRESHOLDS = ("general", "character", "meta", "copyright", "artist")  # categories with a flag of their own


@dataclass(frozen=True, kw_only=True)
class TagOptions(OptionGroup):
    """Tag pictures with a tagger of the WD14 kind."""

    train_data_dir: str = option(REQUIRED, "folder of pictures", flag_type="path", is_positional=True)
    repo_id: str = option("SmilingWolf/wd-v1-4-convnext-tagger-v2", "name of the tagger, of its folder in --model_dir")
    model_dir: str = option(
        "wd14_tagger_model", "folder with the tagger's model.onnx and selected_tags.csv", flag_type="path"
    )
    force_download: bool = option(False, "taken for kohya's sake: nothing is downloaded")
    onnx: bool = option(False, "taken for kohya's sake: the model is always an ONNX file")
    batch_size: int = option(1, "pictures that the model sees at once")
    max_data_loader_n_workers: int | None = option(None, "threads that read pictures; as many as cores when not given")
    recursive: bool = option(False, "take the pictures in folders of the folder too")

    output_path: str | None = option(
        None, "a .json or .jsonl metadata file for all tags, instead of a text file a picture", flag_type="path"
    )
    caption_extention: str | None = option(None, "older spelling of --caption_extension")
    caption_extension: str = option(".txt", "ending of the text files")
    overwrite: bool = option(False, "tag pictures that have their tags already, and replace these")
    append_tags: bool = option(False, "put new tags behind those that are there")
    caption_separator: str = option(", ", "what stands between tags")

    thresh: float = option(0.35, "probability from which a tag counts")
    general_threshold: float | None = option(None, "the same for general tags alone")
    character_threshold: float | None = option(None, "the same for characters")
    meta_threshold: float | None = option(None, "the same for tags on the picture itself, such as its quality")
    model_threshold: float | None = option(None, "taken for kohya's sake: no tagger read here has such tags")
    copyright_threshold: float | None = option(None, "the same for series and brands")
    artist_threshold: float | None = option(None, "the same for artists")

    remove_underscore: bool = option(False, "write blanks instead of underscores, but in faces such as ^_^")
    undesired_tags: str = option("", "tags to leave out, separated by commas")
    use_rating_tags: bool = option(False, "put the most likely rating first")
    use_rating_tags_as_last_tag: bool = option(False, "put the most likely rating last")
    use_quality_tags: bool = option(False, "taken for kohya's sake: no tagger read here has such tags")
    use_quality_tags_as_last_tag: bool = option(False, "taken for kohya's sake: no tagger read here has such tags")
    character_tags_first: bool = option(False, "put characters before all other tags")
    always_first_tags: str | None = option(None, "tags that stand first where a picture has them, separated by commas")
    tag_replacement: str | None = option(None, r"tags to write otherwise: old,new;old2,new2 (\, and \; are the marks)")
    character_tag_expand: bool = option(False, "write a character's name and series as two tags")

    frequency_tags: bool = option(False, "print how often each tag was given")
    debug: bool = option(False, "print the tags of each picture")

    def check(self) -> list[str]:
        given = [f"{name}_threshold" for name in THRESHOLDS if getattr(self, f"{name}_threshold") is not None]
        return [
            *folder_problems(self.train_data_dir),
            *shares(self, "thresh", *given),
            *at_least(self, 1, "batch_size", "max_data_loader_n_workers"),
            *suffix_problems("--output_path", self.output_path),
            *conflict(self, "overwrite", "append_tags", "drop one of the two"),
            *conflict(self, "use_rating_tags", "use_rating_tags_as_last_tag", "drop one of the two"),
        ]


OPTIONS = TagOptions


def main(argv: list[str] | None = None) -> None:
    start_logging(LoggingOptions())
    options = read_options(OPTIONS, argv)
    pictures = find_pictures(Path(options.train_data_dir), options.recursive)
    from library.captioning.tagger import Tagger, model_folder, model_problems
    from library.captioning.tags import TagWriter

    rules = rules_of(options)
    if problems := model_problems(options.model_dir, options.repo_id):
        raise UserError(*problems)
    sink = sink_of(options, pictures)
    pictures = pictures_to_tag(options, pictures, sink)
    if not pictures:
        return
    tagger = Tagger(model_folder(options.model_dir, options.repo_id))
    warn_of_what_has_no_effect(options, set(tagger.table.categories))
    tag_pictures(options, pictures, tagger, TagWriter(tagger.table, rules), sink)


def sink_of(options: TagOptions, pictures: list[Path]) -> Sink:
    """Where the tags go."""
    if options.output_path:
        return MetadataFile(Path(options.output_path), Path(options.train_data_dir))
    return CaptionFiles(caption_extension(options), pictures)


def pictures_to_tag(options: TagOptions, pictures: list[Path], sink: Sink) -> list[Path]:
    """The pictures that lack their tags, or with --overwrite or --append_tags all."""
    if options.overwrite or options.append_tags:
        return pictures
    waiting = [picture for picture in pictures if not sink.has(picture)]
    if done := len(pictures) - len(waiting):
        logger.info("%d of %d have their tags already; --overwrite makes them anew", done, len(pictures))
    return waiting


def rules_of(options: TagOptions) -> "TagRules":
    """What the options say of tags."""
    from library.captioning.tags import TagRules, parse_replacements

    own = {name: getattr(options, f"{name}_threshold") for name in THRESHOLDS}
    rating = "first" if options.use_rating_tags else "last" if options.use_rating_tags_as_last_tag else None
    return TagRules(
        thresholds={name: options.thresh if value is None else value for name, value in own.items()},
        remove_underscore=options.remove_underscore,
        undesired=frozenset(filter(None, map(comparable, options.undesired_tags.split(",")))),
        replacements=parse_replacements(options.tag_replacement or ""),
        expands_characters=options.character_tag_expand,
        characters_first=options.character_tags_first,
        rating=rating,
        always_first=tuple(filter(None, map(str.strip, (options.always_first_tags or "").split(",")))),
        separator=options.caption_separator,
    )


def warn_of_what_has_no_effect(options: TagOptions, categories: set[str]) -> None:
    """A line for each option that is set and asks for what this tagger cannot give."""
    needed = {f"{name}_threshold": name for name in THRESHOLDS}
    needed |= {"use_rating_tags": "rating", "use_rating_tags_as_last_tag": "rating"}
    needed |= {"character_tags_first": "character", "character_tag_expand": "character"}
    needed |= {"model_threshold": "model", "use_quality_tags": "quality", "use_quality_tags_as_last_tag": "quality"}
    for name, category in needed.items():
        if getattr(options, name) not in (None, False) and category not in categories:
            logger.warning("--%s has no effect: this tagger has no %s tags", name, category)
    if options.force_download:
        logger.warning("--force_download has no effect: nothing is downloaded")


def tag_pictures(options: TagOptions, pictures: list[Path], tagger: "Tagger", writer: "TagWriter", sink: Sink) -> None:
    """Write the tags of pictures."""
    from tqdm import tqdm

    from library.captioning.batches import read_in_batches

    batch_size = min(options.batch_size, tagger.largest_batch or options.batch_size)
    if batch_size < options.batch_size:
        logger.warning("--batch_size %d: this tagger takes %d at once", options.batch_size, batch_size)
    logger.info("%s, %d tags, on %s", tagger.path, len(tagger.table.names), tagger.provider)
    frequencies: Counter[str] = Counter()
    damaged: list[str] = []
    batches = read_in_batches(pictures, tagger.read, batch_size, options.max_data_loader_n_workers, damaged)
    try:
        with tqdm(total=len(pictures), desc="tagging", unit="pictures") as bar:
            for batch in batches:
                probabilities = tagger.probabilities([image for _, (image, _) in batch])
                for (picture, (_, size_wh)), row in zip(batch, probabilities, strict=True):
                    tags = writer.tags(row)
                    if options.append_tags:
                        tags = writer.added(sink.read(picture), tags)
                    frequencies.update(tags)
                    text = options.caption_separator.join(tags)
                    sink.write(picture, text, size_wh)
                    if options.debug:
                        bar.write(one_line(f"{picture}: {text}"))
                bar.update(len(batch))
    finally:
        sink.close()
    print(f"tagged {counted(len(pictures) - len(damaged), 'picture')}")
    if options.frequency_tags:
        print(*(f"{tag}: {count}" for tag, count in frequencies.most_common()), sep="\n")
    if damaged:
        raise UserError(f"pictures that cannot be read have no tags: {quoted_list(damaged)}")


if __name__ == "__main__":
    run_script(main)
