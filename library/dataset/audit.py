"""What is worth knowing of a dataset before it is trained: its pictures, their sizes, their captions."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    tags: Counter[str]  # in how many captions each tag is
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
    orphans = {number: orphans_of(subset, index) for number, subset in enumerate(scanned.subsets)}
    found = [
        *_size_findings(scanned, choices),
        _finding_of_groups(same_pictures(decoded), "the same bytes as others"),
        _finding_of_groups(like_pictures(decoded), "nearly the same look as others"),
        *caption_findings(options, scanned, sorted({file for files in orphans.values() for file in files})),
    ]
    return Audit(
        subsets=[_subset_audit(scanned, number, len(orphans[number])) for number in orphans],
        sizes=Counter({record.file: record.size_wh for record in scanned.records}.values()),
        tags=tags_of(scanned),
        findings=[finding for finding in found if finding.items],
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
    pairs = list(zip(scanned.records, choices, strict=True))
    enlarged = _worst((r, c.resized_wh[0] / r.size_wh[0]) for r, c in pairs if c.resized_wh[0] > r.size_wh[0])
    cut = _worst((r, share) for r, c in pairs if (share := 1 - _area(c.bucket_wh) / _area(c.resized_wh)) > CUT_MUCH)
    small = _worst((r, 1 / _area(r.size_wh)) for r, _ in pairs if _is_kept_small(scanned, r))
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
