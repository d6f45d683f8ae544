"""How fast a dataset is scanned, checked and audited, with and without its index; needs no torch.

python tools/benchmark_scan.py FOLDER 10000       # the pictures are made there, if they are not there yet
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from PIL import Image

from library.dataset.audit import audit_of
from library.dataset.buckets import choose_buckets_of
from library.dataset.config import SubsetOptions, spec_from_flags
from library.dataset.picture_index import NAME, PictureIndex
from library.dataset.scan import scan, verify_pictures
from library.options.groups import TrainNetworkOptions

WORDS = ["yabin", "standing", "garden", "smile", "blue sky", "tree", "hat", "red dress", "long hair", "from side"]


def make_pictures(folder: Path, count: int) -> None:
    """JPEGs of 64x64 pixels that all differ, each with a caption of thirty tags."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for number in range(len(list(folder.glob("*.jpg"))), count):
        cells = Image.fromarray(rng.integers(0, 256, (8, 9, 3), dtype=np.uint8))
        cells.resize((64, 64)).save(folder / f"{number:06d}.jpg")
        (folder / f"{number:06d}.txt").write_text(", ".join([f"picture {number}", *rng.choice(WORDS, 30)]))


class Clock:
    """Says how long steps took, and pictures a second of processor time."""

    def __init__(self, num_pictures: int):
        self.num_pictures = num_pictures

    def __call__(self, what: str, function: Callable[..., Any], *arguments: Any) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        result = function(*arguments)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        rate = self.num_pictures / max(cpu, 1e-6)
        print(f"{what:<40} {wall:8.3f} s, {cpu:7.3f} s of CPU, {rate:12,.0f} pictures/s", flush=True)
        return result


def start(state: str, folder: Path, clock: Clock) -> None:
    """What a start does with the dataset until it has been audited and is remembered."""
    subsets, index = [SubsetOptions(image_dir=folder, caption_extension=".txt")], PictureIndex()
    scanned = clock(f"{state}: names, sizes, captions", scan, subsets, None, False, index)
    decoded = clock(f"{state}: every picture decodes", verify_pictures, scanned.records, None, None, index)
    options = TrainNetworkOptions(resolution="64", min_bucket_reso=64)
    scanned.specs.append(spec_from_flags(options))
    clock(f"{state}: audit", audit_of, options, scanned, choose_buckets_of(scanned), decoded, index)
    clock(f"{state}: index written", index.write)


def main(folder: Path, count: int) -> None:
    make_pictures(folder, count)
    (folder / NAME).unlink(missing_ok=True)
    clock = Clock(count)
    start("cold", folder, clock)
    start("warm", folder, clock)
    caption = folder / f"{count // 2:06d}.txt"
    caption.write_text(", ".join(["changed", *reversed(caption.read_text().split(", "))][:31]))
    start("one caption changed", folder, clock)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
