"""A dataset scanned in the way of kohya's scripts, as far as it is known: an imitation, not their code. No torch.

The folder is listed once for each spelling of each extension; each caption is asked for twice and opened, each picture
is opened for its size by the package imagesize, and its aspect ratio compared with those of all buckets by numpy.
Nothing is remembered, so that a second start is as the first. What their scripts do besides is left out.

python tools/benchmarks/kohya_like_scan.py FOLDER 10000
"""

import glob
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import imagesize
import numpy as np

from library.dataset.buckets import bucket_resolutions
from tools.benchmarks.scan_folder import RESOLUTION, SCANNED, Clock, Found, make_pictures, say_found

EXTENSIONS = ".png", ".jpg", ".jpeg", ".webp", ".bmp"
SMALLEST, LARGEST, STEP = 256, 1024, 64  # pixels, of the buckets
FACE = 4  # words at the end of a name that say where a face is


def listed(folder: str) -> list[str]:
    """The pictures of a folder."""
    patterns = [f"*{extension}" for lower in EXTENSIONS for extension in (lower, lower.upper())]
    found = [path for pattern in patterns for path in glob.glob(os.path.join(glob.escape(folder), pattern))]
    return sorted(set(found))


def caption_of(picture: str) -> str:
    """The first line of the file beside a picture, whose name may lack the place of the face."""
    name = os.path.splitext(picture)[0]
    words = name.split("_")
    names = name, "_".join(words[:-FACE]) if len(words) > FACE else name
    places = [path for path in (f"{name}.txt" for name in names) if os.path.isfile(path)]
    if not places:
        return ""
    with open(places[0], encoding="utf-8") as file:
        return file.readlines()[0].strip()


class Buckets:
    """Sizes of buckets, of which each picture gets the one whose width / height is nearest to its own."""

    def __init__(self) -> None:
        self.sizes_wh = bucket_resolutions((RESOLUTION, RESOLUTION), SMALLEST, LARGEST, STEP)
        self.known = set(self.sizes_wh)
        self.aspects = np.array([width / height for width, height in self.sizes_wh])

    def nearest(self, size_wh: tuple[int, int]) -> tuple[int, int]:
        if size_wh in self.known:
            return size_wh
        return self.sizes_wh[int(np.abs(self.aspects - size_wh[0] / size_wh[1]).argmin())]


def scan(folder: str) -> list[Found]:
    """Names, captions, sizes and buckets, one after the other."""
    pictures = listed(folder)
    captions = [caption_of(picture) for picture in pictures]
    sizes = [imagesize.get(picture) for picture in pictures]
    buckets = Buckets()
    chosen = [buckets.nearest(size_wh) for size_wh in sizes]
    return list(zip(pictures, sizes, captions, chosen, strict=True))


def main(folder: str, count: int) -> None:
    make_pictures(Path(folder), count)
    clock = Clock(count)
    clock(f"cold: {SCANNED}", scan, folder)
    say_found(clock(f"warm: {SCANNED}", scan, folder))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
