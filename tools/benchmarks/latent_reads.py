"""Reading one picture's cached latents from disk, as training does at each step; figures as JSON. No torch.

python tools/benchmarks/latent_reads.py FOLDER npz|packed|np.load

npz and packed are ours, by --latent_cache. np.load is an imitation of kohya's scripts, as far as it is known: the file
is opened by numpy at every step.
"""

import json
import random
import statistics
import sys
import time
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from library.dataset.cache import KEYS, CachedLatents
from library.dataset.latent_files import LatentFiles, NpzLatents
from library.dataset.packed_latents import PackedLatents
from library.dataset.scan import ImageRecord

NUM_PICTURES, NUM_PASSES = 300, 11  # the first pass is told apart
SIZE_WH, SHAPE = (512, 512), (4, 64, 64)
OURS: dict[str, Callable[[str], LatentFiles]] = {"npz": NpzLatents, "packed": PackedLatents}
NP_LOAD = "np.load"


def kohya_like_read(path: str) -> CachedLatents:
    """Everything of one file, opened anew."""
    with np.load(path) as file:
        arrays = {key: file[key] for key in KEYS if key in file}
    size_wh, crop_ltrb = (tuple(arrays[key].tolist()) for key in ("original_size", "crop_ltrb"))
    return CachedLatents(arrays["latents"], size_wh, crop_ltrb)


def prepared(folder: Path, how: str) -> tuple[list[str], Callable[[str], CachedLatents]]:
    """Places of latents, which are written where they are missing, and what reads them."""
    folder = folder / how
    folder.mkdir(parents=True, exist_ok=True)
    records = [ImageRecord(str(folder / f"{number:04d}.png"), SIZE_WH, "", False, 0) for number in range(NUM_PICTURES)]
    files = OURS.get(how, NpzLatents)("sd")
    places = [files.place(record) for record in records]
    for number, place in enumerate(places):
        if not files.has(place):
            write(files, place, number, how)
    files.finish()
    return places, kohya_like_read if how == NP_LOAD else files.read


def write(files: LatentFiles, place: str, number: int, how: str) -> None:
    latents = np.random.default_rng(number).standard_normal(SHAPE, dtype=np.float32)
    crop_ltrb = 0.0, 0.0, *map(float, SIZE_WH)
    if how == NP_LOAD:
        np.savez(place, latents=latents, original_size=np.array(SIZE_WH), crop_ltrb=np.array(crop_ltrb))
    else:
        files.write(place, CachedLatents(latents, SIZE_WH, crop_ltrb), None)


def timed(read: Callable[[str], CachedLatents], places: Iterable[str]) -> tuple[float, float]:
    """Milliseconds a picture, and of CPU."""
    wall, cpu = time.perf_counter(), time.process_time()
    for place in places:
        read(place)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return 1000 * wall / NUM_PICTURES, 1000 * cpu / NUM_PICTURES


def main(folder: str, how: str) -> None:
    places, read = prepared(Path(folder), how)
    rng = random.Random(0)
    orders = [rng.sample(places, len(places)) for _ in range(NUM_PASSES)]
    (first, first_cpu), *later = [timed(read, order) for order in orders]
    wall, cpu = (statistics.median(values) for values in zip(*later, strict=True))
    found = zlib.crc32(b"".join(read(place).latents.tobytes() for place in places))
    figures = {"read_ms": wall, "read_cpu_ms": cpu, "first_ms": first, "first_cpu_ms": first_cpu, "found": found}
    print(json.dumps(figures))


if __name__ == "__main__":
    main(*sys.argv[1:])
