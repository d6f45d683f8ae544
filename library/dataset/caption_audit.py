"""What is worth knowing of the captions of a dataset: tags, lengths, and captions that are empty or of no picture."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from random import Random
from typing import Any

from library.dataset.captions import process_caption
from library.dataset.config import SubsetOptions, is_picture_name
from library.dataset.findings import Finding, named
from library.dataset.folder import CAPTION_EXTENSIONS, as_compared, caption_names
from library.dataset.picture_index import PictureIndex
from library.dataset.scan import ScannedDataset
from library.families.clip_vocabulary import CHUNK, token_counts

# a subset with these sees whole captions
NOTHING_CHANGED = dict(
    shuffle_caption=False,
    enable_wildcard=False,
    token_warmup_step=0,
    caption_dropout_rate=0.0,
    caption_dropout_every_n_epochs=0,
    caption_tag_dropout_rate=0.0,
)


def caption_findings(options: Any, scanned: ScannedDataset, orphans: list[str]) -> list[Finding]:
    """Captions that are empty, of no picture, or longer than the text encoders see."""
    empty = sorted({record.file for record in scanned.records if record.caption_found and not record.caption})
    limit = options.max_token_length or CHUNK
    lengths = _lengths(scanned, options.weighted_captions)
    too_long = sorted(((-length, file) for file, length in lengths.items() if length > limit))
    advice = "" if limit == 3 * CHUNK else f"; --max_token_length {limit + CHUNK} takes more"
    return [
        Finding("with an empty caption file", [named(file) for file in empty], matters=False),  # a note of the scan
        Finding("of no picture", [named(file) for file in orphans], noun="caption file"),
        Finding(
            f"longer than {limit} tokens, and the rest is not seen{advice}",
            [f"{named(file)} {-length} tokens" for length, file in too_long],
            noun="caption",
        ),
    ]


def orphans_of(subset: SubsetOptions, index: PictureIndex) -> list[str]:
    """The caption files of a folder that belong to no picture of it."""
    if subset.metadata_file:
        return []
    names = index.folder(subset.image_dir).names
    pictures = list(filter(is_picture_name, names))
    orphans = []
    for extension in {subset.caption_extension, *CAPTION_EXTENSIONS}:
        captions = {as_compared(name): name for name in names if name.endswith(extension)}
        for picture in pictures if captions else []:
            for name in caption_names(picture, extension):
                captions.pop(as_compared(name), None)
        orphans += captions.values()
    return sorted(str(subset.image_dir / name) for name in orphans if not name.startswith("."))


def tags_of(scanned: ScannedDataset) -> Counter[str]:
    """In how many captions of training pictures each tag is."""
    subsets = scanned.subsets
    captions = {r.file: (r.caption, r.subset) for r in scanned.records if not subsets[r.subset].is_reg}
    parts = (caption.split(subsets[subset].caption_separator) for caption, subset in captions.values())
    tags = Counter(chain.from_iterable(set(map(str.strip, tags)) for tags in parts))
    del tags[""]
    return tags


def _lengths(scanned: ScannedDataset, weighted: bool) -> dict[str, int]:
    """Picture -> tokens of the longest caption that a step may see of it."""
    seen = list(_seen(scanned))
    counts = token_counts({text for _, text in seen}, weighted)
    lengths: dict[str, int] = {}
    for file, text in seen:
        lengths[file] = max(counts[text], lengths.get(file, 0))
    return lengths


def _seen(scanned: ScannedDataset) -> Iterator[tuple[str, str]]:
    """Pictures with their captions in full; of choices {a|b} all are counted."""
    unused = Random(0)
    whole = [replace(subset, **NOTHING_CHANGED) for subset in scanned.subsets]
    for record in scanned.records:
        for line in record.caption.split("\n"):
            caption = process_caption(line, whole[record.subset], step=0, epoch=1, max_train_steps=1, rng=unused)
            yield record.file, caption.replace(scanned.subsets[record.subset].keep_tokens_separator or "\0", ", ")
