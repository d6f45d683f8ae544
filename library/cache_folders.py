"""Whether the folders of the pictures take the files that caches are to be kept in. Needs no torch."""

import os
from collections import defaultdict
from collections.abc import Iterable

from library.dataset.scan import ImageRecord, ScannedDataset
from library.errors import counted
from library.families import writes_text
from library.files import why_not_writable
from library.options.groups import TrainNetworkOptions


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
            npz = {name for name in os.listdir(folder) if name.endswith(".npz")}
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
