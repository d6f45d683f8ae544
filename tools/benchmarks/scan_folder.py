"""The folder that scans are timed on, the clock they are timed by, and a number for what they found. No torch."""

import os
import time
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

WORDS = ["yabin", "standing", "garden", "smile", "blue sky", "tree", "hat", "red dress", "long hair", "from side"]
SIDES = 48, 97  # pixels, from and below; 2,401 sizes of all aspect ratios
RESOLUTION = 512  # of the buckets, which have kohya's defaults otherwise
SCANNED = "names, sizes, captions, buckets"  # the line that is compared
Found = tuple[str, tuple[int, int], str, tuple[int, int]]  # file, size, caption, bucket; sizes in pixels, width first


def make_pictures(folder: Path, count: int) -> None:
    """Small JPEGs of many sizes that all differ, each with a caption of thirty tags; as if made an hour ago.

    Of a file that was just changed nothing is remembered.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made = time.time() - 3600
    for number in range(len(list(folder.glob("*.jpg"))), count):
        picture, caption = (folder / f"{number:06d}{extension}" for extension in (".jpg", ".txt"))
        rng = np.random.default_rng(number)
        cells = Image.fromarray(rng.integers(0, 256, (8, 9, 3), dtype=np.uint8))
        caption.write_text(", ".join([f"picture {number}", *rng.choice(WORDS, 30)]))
        cells.resize(tuple(rng.integers(*SIDES, 2).tolist())).save(picture)
        for path in (picture, caption):
            os.utime(path, (made, made))


class Clock:
    """Says how long steps took, and pictures a second of processor time."""

    def __init__(self, num_pictures: int):
        self.num_pictures = num_pictures

    def __call__(self, what: str, function: Callable[..., Any], *arguments: Any) -> Any:
        wall, cpu = time.perf_counter(), processor_seconds()
        result = function(*arguments)
        wall, cpu = time.perf_counter() - wall, processor_seconds() - cpu
        rate = self.num_pictures / max(cpu, 1e-6)
        print(f"{what:<45} {wall:8.3f} s, {cpu:7.3f} s of CPU, {rate:12,.0f} pictures/s", flush=True)
        return result


def processor_seconds() -> float:
    """Of this process, and of those that it started and that have ended."""
    children = os.times()
    return time.process_time() + children.children_user + children.children_system


def say_found(found: Iterable[Found]) -> None:
    """A number that is the same for all who found the same."""
    lines = "\n".join(sorted(repr((os.path.basename(file), *rest)) for file, *rest in found))
    print(f"found {zlib.crc32(lines.encode())}", flush=True)
