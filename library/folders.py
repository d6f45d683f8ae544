"""Whether folders take the files that a run is to write there: its output, and caches beside pictures."""

import os
import shutil
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from library.dataset.pack_files import packed_names
from library.dataset.scan import ImageRecord, ScannedDataset
from library.errors import counted
from library.families import writes_text
from library.files import existing_part, why_not_writable
from library.options.groups import TrainNetworkOptions

MIN_FREE_BYTES = 200_000_000


def check_writable(name: str, folder_text: str) -> list[str]:
    """Problems with a folder that files go to: it is made where it is missing, and must be writable."""
    folder = Path(folder_text)
    existing = existing_part(folder)
    if existing is None:
        return [f"--{name}: {folder} cannot be made: there is no such drive"]
    if not existing.is_dir():
        return [f"--{name}: {folder} cannot be made, because {existing} is a file"]
    if reason := why_not_writable(existing):
        return [f"--{name}: {folder} cannot be written to ({reason}); give a folder of your own"]
    free = shutil.disk_usage(existing).free
    if free < MIN_FREE_BYTES:
        left, needed = f"{free / 1e6:.0f} MB left", f"{MIN_FREE_BYTES / 1e6:.0f} MB"
        return [f"--{name}: the disk of {folder} has only {left}, and {needed} is the least; make room or give another"]
    return []


def cache_folder_problems(options: TrainNetworkOptions, family: str | None, scanned: ScannedDataset) -> list[str]:
    """A sentence for each folder of pictures that is read-only and lacks some of the files."""
    wanted = []
    if options.cache_latents_to_disk:
        wanted.append(("cache_latents", "latents", latents_lacking))
    if family and writes_text(options, family):
        wanted.append(("cache_text_encoder_outputs", "text encoder outputs", text_lacking))
    folders = defaultdict(list)
    for record in scanned.records if wanted else ():
        folders[os.path.dirname(record.file)].append(record)
    problems = []
    for folder, records in folders.items():
        if reason := why_not_writable(folder):
            names = os.listdir(folder)
            npz = {name for name in names if name.endswith(".npz")} | packed_names(names, folder, family or "sd")
            problems += [
                f"--{flag}_to_disk: {counted(number, 'picture')} in {folder} have no {what} there yet, and the folder "
                f"cannot be written to ({reason}); allow that, or give --{flag} alone, which keeps them in memory"
                for flag, what, lacking in wanted
                if (number := lacking(records, npz))
            ]
    return problems


def latents_lacking(records: Iterable[ImageRecord], npz: set[str]) -> int:
    """How many pictures have no latents among the files of their folder, by their names."""
    known = {name.rpartition("_")[0] for name in npz}
    return sum(
        f"{record.path.stem}_{record.size_wh[0]:04d}x{record.size_wh[1]:04d}" not in known
        and f"{record.path.stem}.npz" not in npz
        for record in records
        if not record.is_gone
    )


def text_lacking(records: Iterable[ImageRecord], npz: set[str]) -> int:
    return sum(f"{record.path.stem}_te_outputs.npz" not in npz for record in records)
