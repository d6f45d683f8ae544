"""What is worth knowing of a dataset before it is trained: its pictures, their sizes, their captions."""

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from library.dataset.audit_memory import AuditMemory, digest_of
from library.dataset.buckets import BucketChoice
from library.dataset.caption_audit import caption_findings, orphans_of, tags_of
from library.dataset.collecting import collector_paused
from library.dataset.config import Size
from library.dataset.findings import Finding, named
from library.dataset.likeness import Groups, like_pictures, same_pictures
from library.dataset.picture_files import Decoded
from library.dataset.picture_index import PictureIndex
from library.dataset.scan import ImageRecord, ScannedDataset
from library.options.derived import resolution_wh

ENLARGED_MUCH = 1.5  # factor by which a picture is enlarged, above which it is told without being asked
CUT_MUCH = 1 / 3  # share of a picture that is cropped, above which it is told


@dataclass(frozen=True)
class SubsetAudit:
    """The pictures of one folder or metadata file, counted."""

    source: Path
    is_reg: bool
    num_repeats: int
    num_pictures: int
    num_captioned: int
    num_empty: int  # of the captions
    num_orphans: int  # caption files without a picture


@dataclass(frozen=True)
class Audit:
    """What was found of a dataset."""

    subsets: list[SubsetAudit]
    sizes: Counter[Size]  # of the pictures, upright, in pixels
    tags: Counter[str]  # in how many captions each tag is; counted for --dry_run alone, which shows them
    findings: list[Finding]

    @property
    def warnings(self) -> list[str]:
        """A line for each finding that matters."""
        return [finding.sentence for finding in self.findings if finding.matters]


@collector_paused()
def audit_of(
    options: Any,
    scanned: ScannedDataset,
    choices: Sequence[BucketChoice],
    decoded: Mapping[str, Decoded],
    index: PictureIndex,
) -> Audit:
    """Look through a dataset that was scanned and decoded; `index` knows what else is in its folders."""
    first = scanned.records[0].file if scanned.records else None
    memory = AuditMemory(index.audit_of(first) if first else b"")
    orphans = {number: orphans_of(subset, index) for number, subset in enumerate(scanned.subsets)}
    same, like = _groups(decoded, memory)
    found = [
        *_size_findings(scanned, choices),
        _finding_of_groups(same, "the same bytes as others"),
        _finding_of_groups(like, "nearly the same look as others"),
        *caption_findings(options, scanned, sorted({file for files in orphans.values() for file in files}), memory),
    ]
    tags = tags_of(scanned, memory) if options.dry_run else Counter()
    if first and memory.has_changed:
        index.note_audit(first, memory.packed())
    return Audit(
        subsets=[_subset_audit(scanned, number, len(orphans[number])) for number in orphans],
        sizes=Counter({record.file: record.size_wh for record in scanned.records}.values()),
        tags=tags,
        findings=[finding for finding in found if finding.items],
    )


def _groups(decoded: Mapping[str, Decoded], memory: AuditMemory) -> tuple[Groups, Groups]:
    """Groups of files with the same bytes, and of those that look alike."""
    files = sorted(decoded)
    marks = chain.from_iterable((d.look, d.colour, d.content, d.num_bytes) for d in map(decoded.get, files))
    digest = digest_of(["\0".join(files), array("Q", marks).tobytes()])
    return (
        memory.answer("same", digest, lambda: same_pictures(decoded), _is_groups),
        memory.answer("like", digest, lambda: like_pictures(decoded), _is_groups),
    )


def _is_groups(answer: Any) -> bool:
    return isinstance(answer, list) and all(
        isinstance(group, list) and len(group) > 1 and all(isinstance(file, str) for file in group) for group in answer
    )


def _subset_audit(scanned: ScannedDataset, number: int, num_orphans: int) -> SubsetAudit:
    subset = scanned.subsets[number]
    mine = [record for record in scanned.records if record.subset == number]
    return SubsetAudit(
        subset.source,
        subset.is_reg,
        subset.num_repeats,
        num_pictures=len(mine),
        num_captioned=sum(record.caption_found for record in mine),
        num_empty=sum(record.caption_found and not record.caption for record in mine),
        num_orphans=num_orphans,
    )


def _size_findings(scanned: ScannedDataset, choices: Sequence[BucketChoice]) -> list[Finding]:
    kinds = [(id(choice), r.size_wh, r.subset) for r, choice in zip(scanned.records, choices, strict=True)]
    example_of = dict(zip(kinds, zip(scanned.records, choices, strict=True), strict=True))

    def worst(measure: Callable[[ImageRecord, BucketChoice], float]) -> dict[str, float]:
        """Pictures whose measure is not 0; those of one size share one."""
        of_kind = {kind: value for kind, example in example_of.items() if (value := measure(*example))}
        of_record = zip(scanned.records, map(of_kind.get, kinds), strict=True) if of_kind else ()
        return _worst((record, value) for record, value in of_record if value)

    enlarged, cut = worst(_enlargement), worst(_share_cut)
    small = worst(lambda record, _: 1 / _area(record.size_wh) if _is_kept_small(scanned, record) else 0)
    largest = max(enlarged.values(), default=0)
    return [
        Finding(
            f"smaller than the size they are trained at, and enlarged, the smallest {largest:.1f} times",
            [f"{named(file)} {factor:.1f} times" for file, factor in enlarged.items()],
            matters=largest >= ENLARGED_MUCH,
        ),
        Finding(
            "smaller than the resolution, and trained at their own size (bucket_no_upscale)",
            [named(file) for file in small],
            matters=False,
        ),
        Finding(
            f"of a shape that fits no bucket: more than {CUT_MUCH:.0%} of them is cut off",
            [f"{named(file)} {share:.0%}" for file, share in cut.items()],
        ),
    ]


def _enlargement(record: ImageRecord, choice: BucketChoice) -> float:
    factor = choice.resized_wh[0] / record.size_wh[0]
    return factor if factor > 1 else 0


def _share_cut(_: ImageRecord, choice: BucketChoice) -> float:
    share = 1 - _area(choice.bucket_wh) / _area(choice.resized_wh)
    return share if share > CUT_MUCH else 0


def _is_kept_small(scanned: ScannedDataset, record: ImageRecord) -> bool:
    spec = scanned.specs[scanned.subsets[record.subset].dataset]
    return spec.enable_bucket and spec.bucket_no_upscale and _area(record.size_wh) < _area(resolution_wh(spec))


def _worst(measured: Iterable[tuple[ImageRecord, float]]) -> dict[str, float]:
    """Picture -> the largest of its measures, the largest first."""
    largest: dict[str, float] = {}
    for record, measure in measured:
        largest[record.file] = max(measure, largest.get(record.file, measure))
    return dict(sorted(largest.items(), key=lambda item: (-item[1], item[0])))


def _finding_of_groups(groups: Groups, what: str) -> Finding:
    more = [f"{named(group[0])} = {named(other)}" for group in groups for other in group[1:]]
    return Finding(what, more, verb="has", plural_verb="have")


def _area(size_wh: Size) -> int:
    return size_wh[0] * size_wh[1]
