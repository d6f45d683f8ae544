"""Computed once: latents, from the VAE or from files, and what a frozen text encoder makes of captions."""

import itertools
import logging
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeVar

from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from library.dataset.cache import CachedLatents
from library.dataset.cache_check import ABSENT, OTHER_VAE, WantedLatents
from library.dataset.dataset import TrainingDataset
from library.dataset.latent_files import LatentFiles, NpzLatents
from library.dataset.packed_latents import PackedLatents
from library.errors import UserError, counted, quoted_list
from library.families.base import ModelFamily
from library.options.groups import DatasetOptions
from library.training.encoding import encode_pictures
from library.training.vae_check import VaeCheck

logger = logging.getLogger(__name__)

Item = TypeVar("Item")

KINDS: dict[str, type[LatentFiles]] = {"npz": NpzLatents, "packed": PackedLatents}  # by --latent_cache


TAKEN_OVER = {"npz": "taken from packs", "packed": "taken from .npz files, which this cache no longer needs"}


class Place(NamedTuple):
    """Where the latents of a record are on disk, and what they must be."""

    path: str  # as by LatentFiles.place
    wanted: WantedLatents


class Caches(NamedTuple):
    """The latents on disk that a run keeps, and those of the other kind, which it takes over where they fit."""

    own: LatentFiles
    other: LatentFiles


def cache_latents(
    dataset: TrainingDataset, family: ModelFamily, options: DatasetOptions, accelerator: Accelerator
) -> None:
    """Give every record its latents; with --cache_latents_to_disk valid files are used and missing ones written.

    Processes share the work on files. What stays in memory each of them computes for itself.
    """
    in_memory = [index for index, repeats in enumerate(dataset.repeats) if repeats]  # 0: beyond the balance
    broken = []
    if options.cache_latents_to_disk:
        kinds = {name: kind(family.name) for name, kind in KINDS.items()}
        caches = Caches(kinds.pop(options.latent_cache), *kinds.values())
        places, in_memory = places_of(dataset, in_memory, caches.own)
        broken += cache_on_disk(dataset, family, options, accelerator, places, caches)
    require_pictures(dataset, in_memory)
    broken += encode_pictures(dataset, family.vae, in_memory, options, accelerator, dataset.latents.__setitem__)
    if broken:
        names = quoted_list([str(dataset.scanned.records[index].path) for index in sorted(broken)])
        raise UserError(f"the VAE made NaN of {names}; use --no_half_vae, or another --vae")


def require_pictures(dataset: TrainingDataset, indices: Iterable[int]) -> None:
    """UserError where latents are to be made of pictures that are gone."""
    records = dataset.scanned.records
    if gone := [str(records[index].path) for index in indices if records[index].is_gone]:
        raise UserError(f"pictures are gone, and no latents on disk fit this run in their place: {quoted_list(gone)}")


def cache_text(datasets: Sequence[TrainingDataset], family: ModelFamily, accelerator: Accelerator) -> None:
    """Encode all captions, if they are the same in every draw, so that the text encoder can leave the device.

    The numbers are those that `family.conds` would compute later, under the same autocast.
    """
    captions_of_each = [dataset.distinct_captions() for dataset in datasets]
    if None in captions_of_each:
        return
    captions = list(dict.fromkeys(itertools.chain(*captions_of_each)))
    hidden = not accelerator.is_local_main_process
    with (
        accelerator.autocast(),
        tqdm(total=len(captions), desc="encoding captions", unit="captions", disable=hidden, delay=1) as bar,
    ):
        all_remembered = family.remember_text(captions, bar.update)
    if not all_remembered:
        logger.warning(
            "%d different captions would take over 2 GB when encoded beforehand; the text encoder stays where it is",
            len(captions),
        )


def places_of(dataset: TrainingDataset, indices: list[int], files: LatentFiles) -> tuple[dict[int, Place], list[int]]:
    """The place of each record's latents, and the records that cannot have one.

    The name tells neither a picture's ending nor its bucket; of two records that differ there, the first has the place.
    """
    first_of: dict[str, WantedLatents] = {}
    places: dict[int, Place] = {}
    crowded_out = []
    for index in indices:
        wanted, path = dataset.wanted_latents(index), files.place(dataset.scanned.records[index])
        if first_of.setdefault(path, wanted) == wanted:
            places[index] = Place(path, wanted)
        else:
            crowded_out.append(index)
    if crowded_out:
        logger.warning(
            "the latents of %s stay in memory: a picture of the same name, or the same one in another dataset, needs "
            "their file",
            counted(len(crowded_out), "picture"),
        )
    return places, crowded_out


def cache_on_disk(
    dataset: TrainingDataset,
    family: ModelFamily,
    options: DatasetOptions,
    accelerator: Accelerator,
    places: dict[int, Place],
    caches: Caches,
) -> list[int]:
    """Write the latents that are missing or of no use; returns the records of which the VAE made NaN."""
    vae, own = VaeCheck(family), caches.own
    folders = {os.path.dirname(place.path) for place in places.values()}
    if accelerator.is_main_process:
        own.clear_up(folders)
    accelerator.wait_for_everyone()
    try:
        missing, num_taken = find_missing(dataset, options, accelerator, places, caches, vae)
        require_pictures(dataset, missing)
        to_make = missing[accelerator.process_index :: accelerator.num_processes]
        sketch = vae.sketch if to_make else None

        def write(index: int, cached: CachedLatents) -> None:
            own.write(places[index].path, cached, places[index].wanted.origin(sketch))

        broken = encode_pictures(dataset, family.vae, to_make, options, accelerator, write)
    finally:
        own.finish()
    broken = gather_object(broken)
    if (missing or num_taken) and accelerator.is_main_process:
        own.tidy(folders)
    accelerator.wait_for_everyone()
    dataset.latents_files = own
    dataset.latents_paths.update({index: place.path for index, place in places.items()})
    return broken


def find_missing(
    dataset: TrainingDataset,
    options: DatasetOptions,
    accelerator: Accelerator,
    places: dict[int, Place],
    caches: Caches,
    vae: VaeCheck,
) -> tuple[list[int], int]:
    """The records whose latents must be made, when all that fits was taken over, and how many that was."""
    owners = sorted({place.path: index for index, place in places.items()}.values())  # one record for each place
    mine = {index: places[index] for index in owners[accelerator.process_index :: accelerator.num_processes]}
    if options.skip_cache_check:
        reasons = {index: ABSENT for index, place in mine.items() if not caches.own.has(place.path)}
    else:
        reasons = reasons_to_make(dataset, caches.own, mine, vae, accelerator)
    taken = take_over(dataset, caches, {index: places[index] for index in reasons}, vae, accelerator)
    found = gather_object([(index, reason) for index, reason in reasons.items() if index not in taken])
    num_taken = sum(gather_object([len(taken)]))
    log_findings("latents", len(owners), Counter(reason for _, reason in found))
    if num_taken:
        logger.info("latents: those of %s were %s", counted(num_taken, "picture"), TAKEN_OVER[options.latent_cache])
    return sorted(index for index, _ in found), num_taken


def reasons_to_make(
    dataset: TrainingDataset, files: LatentFiles, places: dict[int, Place], vae: VaeCheck, accelerator: Accelerator
) -> dict[int, str]:
    """The records whose latents on disk cannot be used, and why."""
    hidden = not accelerator.is_local_main_process
    found = tqdm(
        files.examine(list(places.values())),
        total=len(places), desc="checking latents", unit="files", disable=hidden, delay=1,
    )  # fmt: skip
    findings = dict(zip(places, found, strict=True))
    usable = [index for index, finding in findings.items() if finding.reason is None]
    sketches = {index: findings[index].vae for index in usable if findings[index].vae is not None}
    others = [index for index in usable if findings[index].vae is None]
    reasons = {index: finding.reason for index, finding in findings.items() if finding.reason}
    is_right = {key: vae.made(sketch) for key, sketch in {s.tobytes(): s for s in sketches.values()}.items()}
    reasons |= {index: OTHER_VAE for index, sketch in sketches.items() if not is_right[sketch.tobytes()]}
    comparable = [index for index in others if not dataset.scanned.records[index].is_gone]
    if not all(vae.may_have_made(files.read(places[i].path).latents, dataset.image(i)) for i in spread(comparable)):
        reasons |= dict.fromkeys(others, OTHER_VAE)
    return reasons


def take_over(
    dataset: TrainingDataset, caches: Caches, places: dict[int, Place], vae: VaeCheck, accelerator: Accelerator
) -> set[int]:
    """Copy what fits of the other kind of files into places that lack latents of use; returns whose those were."""
    records = dataset.scanned.records
    there = {index: Place(caches.other.place(records[index]), place.wanted) for index, place in places.items()}
    there = {index: place for index, place in there.items() if caches.other.has(place.path)}
    useless = reasons_to_make(dataset, caches.other, there, vae, accelerator)
    fitting = sorted(there.keys() - useless.keys())
    hidden = not accelerator.is_local_main_process
    taken = set()
    for index in tqdm(fitting, desc="taking latents over", unit="pictures", disable=hidden, delay=1):
        try:
            found = caches.other.read_with_origin(there[index].path)
        except UserError:  # damaged, of which a pack tells only now
            continue
        caches.own.write(places[index].path, *found)
        taken.add(index)
    return taken


def spread(items: list[Item]) -> list[Item]:
    """A few of the items, from the first to the last."""
    last = len(items) - 1
    return [items[i] for i in sorted({0, last // 2, last})] if items else []


def log_findings(what: str, num_files: int, reasons: Counter[str]) -> None:
    anew = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common() if reason != ABSENT)
    logger.info(
        "%s: %d of %d pictures have theirs on disk%s",
        what,
        num_files - reasons.total(),
        num_files,
        f"; made anew: {anew}" if anew else "",
    )
