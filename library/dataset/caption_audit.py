"""What is worth knowing of the captions of a dataset: tags, lengths, and captions that are empty or of no picture."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from itertools import chain, groupby
from operator import attrgetter
from random import Random
from typing import Any

from library.dataset.audit_memory import AuditMemory, caption_digests, digest_of
from library.dataset.captions import process_caption
from library.dataset.config import SubsetOptions
from library.dataset.findings import Finding, named
from library.dataset.folder import CAPTION_EXTENSIONS, as_compared, caption_names, stem_of
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

# what else of a subset decides on how a caption is seen
SEEN_BY = ("caption_prefix", "caption_suffix", "caption_separator", "secondary_separator", "keep_tokens_separator")
UNUSED = Random(0)


def caption_findings(options: Any, scanned: ScannedDataset, orphans: list[str], memory: AuditMemory) -> list[Finding]:
    """Captions that are empty, of no picture, or longer than the text encoders see."""
    empty = sorted({record.file for record in scanned.records if record.caption_found and not record.caption})
    limit = options.max_token_length or CHUNK
    lengths: dict[str, int] = {}  # of the longest caption that a step may see of a picture
    for record, length in zip(scanned.records, _lengths(scanned, options.weighted_captions, memory), strict=True):
        if length > limit:
            lengths[record.file] = max(length, lengths.get(record.file, 0))
    too_long = sorted((-length, file) for file, length in lengths.items())
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
    files = index.folder(subset.image_dir)
    stems, orphans = list(map(stem_of, files.picture_names)), []
    for extension in {subset.caption_extension, *CAPTION_EXTENSIONS}:
        captions = {as_compared(name): name for name in files.names if name.endswith(extension)}
        left = captions.keys() - {as_compared(stem + extension) for stem in stems} if captions else set()
        for picture in files.picture_names if left else []:
            left -= set(map(as_compared, caption_names(picture, extension)))
        orphans += [captions[name] for name in left]
    return sorted(str(subset.image_dir / name) for name in orphans if not name.startswith("."))


def tags_of(scanned: ScannedDataset, memory: AuditMemory) -> Counter[str]:
    """In how many captions of training pictures each tag is."""
    subsets = scanned.subsets
    captions = {r.file: (r.caption, r.subset) for r in scanned.records if not subsets[r.subset].is_reg}
    separators = [subset.caption_separator for subset in subsets]
    texts = [caption for caption, _ in captions.values()]
    digest = digest_of(["\0".join(texts), str([separators[subset] for _, subset in captions.values()])])
    return Counter(memory.answer("tags", digest, lambda: _tags(captions.values(), separators), _is_counts))


def _tags(captions: Iterable[tuple[str, int]], separators: list[str]) -> dict[str, int]:
    parts = (caption.split(separators[subset]) for caption, subset in captions)
    tags = Counter(chain.from_iterable(set(map(str.strip, tags)) for tags in parts))
    del tags[""]
    return dict(tags)


def _is_counts(answer: Any) -> bool:
    return isinstance(answer, dict) and all(type(count) is int for count in answer.values())


def _lengths(scanned: ScannedDataset, weighted: bool, memory: AuditMemory) -> list[int]:
    """The tokens of the longest caption that a step may see of each record; counted where they are not known."""
    records, whole = scanned.records, [replace(subset, **NOTHING_CHANGED) for subset in scanned.subsets]
    uses = [str([weighted, *(getattr(subset, name) for name in SEEN_BY)]) for subset in whole]
    digests = []
    for number, mine in groupby(records, key=attrgetter("subset")):
        digests += caption_digests([record.caption for record in mine], uses[number])

    def count(places: list[int]) -> dict[int, int]:
        seen = {place: _seen(records[place].caption, whole[records[place].subset]) for place in places}
        tokens = token_counts(set(chain.from_iterable(seen.values())), weighted)
        return {place: max(tokens[text] for text in texts) for place, texts in seen.items()}

    return memory.token_counts(digests, count)


def _seen(caption: str, subset: SubsetOptions) -> list[str]:
    """A caption in full, each of its lines; of choices {a|b} all are counted."""
    lines = [
        process_caption(line, subset, step=0, epoch=1, max_train_steps=1, rng=UNUSED) for line in caption.split("\n")
    ]
    return [line.replace(subset.keep_tokens_separator or "\0", ", ") for line in lines]
