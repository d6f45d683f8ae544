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


def timed(what: str, function: Callable[..., Any], *arguments: Any) -> Any:
    wall, cpu = time.perf_counter(), time.process_time()
    result = function(*arguments)
    print(f"{what:<32} {time.perf_counter() - wall:8.3f} s, {time.process_time() - cpu:7.3f} s of CPU", flush=True)
    return result


def main(folder: Path, count: int) -> None:
    make_pictures(folder, count)
    (folder / NAME).unlink(missing_ok=True)
    subsets = [SubsetOptions(image_dir=folder, caption_extension=".txt")]
    for state in ("cold", "warm"):
        index = PictureIndex()
        scanned = timed(f"{state}: names, sizes, captions", scan, subsets, None, False, index)
        decoded = timed(f"{state}: every picture decodes", verify_pictures, scanned.records, None, None, index)
        timed(f"{state}: index written", index.write)
    options = TrainNetworkOptions(resolution="64", min_bucket_reso=64)
    scanned.specs.append(spec_from_flags(options))
    timed("audit", audit_of, options, scanned, choose_buckets_of(scanned), decoded, index)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
