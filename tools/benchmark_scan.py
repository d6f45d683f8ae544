"""How fast a dataset is scanned, checked and audited, with and without its index; needs no torch.

python tools/benchmark_scan.py FOLDER 10000       # the pictures are made there, if they are not there yet
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.dataset.audit import audit_of
from library.dataset.buckets import BucketChoice, choose_buckets_of
from library.dataset.config import SubsetOptions, spec_from_flags
from library.dataset.picture_index import NAME, PictureIndex
from library.dataset.scan import ScannedDataset, scan, verify_pictures
from library.options.groups import TrainNetworkOptions
from tools.benchmarks.scan_folder import RESOLUTION, SCANNED, Clock, make_pictures, say_found

AS_TRAINED = TrainNetworkOptions(resolution=str(RESOLUTION), enable_bucket=True)


def scan_into_buckets(folder: Path, index: PictureIndex) -> tuple[ScannedDataset, list[BucketChoice]]:
    """The pictures of a folder, and the bucket of each."""
    scanned = scan([SubsetOptions(image_dir=folder, caption_extension=".txt")], index=index)
    scanned.specs.append(spec_from_flags(AS_TRAINED))
    return scanned, choose_buckets_of(scanned)


def start(state: str, folder: Path, clock: Clock) -> tuple[ScannedDataset, list[BucketChoice]]:
    """What a start does with the dataset until it has been audited and is remembered."""
    index = PictureIndex()
    scanned, choices = clock(f"{state}: {SCANNED}", scan_into_buckets, folder, index)
    decoded = clock(f"{state}: every picture decodes", verify_pictures, scanned.records, None, None, index)
    clock(f"{state}: audit", audit_of, AS_TRAINED, scanned, choices, decoded, index)
    clock(f"{state}: index written", index.write)
    return scanned, choices


def main(folder: Path, count: int) -> None:
    make_pictures(folder, count)
    (folder / NAME).unlink(missing_ok=True)
    clock = Clock(count)
    start("cold", folder, clock)
    scanned, choices = start("warm", folder, clock)
    caption = folder / f"{count // 2:06d}.txt"
    before = caption.read_text()
    caption.write_text(f"changed, {before}")
    try:
        start("one caption changed", folder, clock)
    finally:
        caption.write_text(before)
    pictures = zip(scanned.records, choices, strict=True)
    say_found((record.file, record.size_wh, record.caption, choice.bucket_wh) for record, choice in pictures)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
