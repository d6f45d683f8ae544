"""Computed once: latents, from the VAE or from kohya's .npz files, and what a frozen text encoder makes of captions."""

import itertools
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from library.dataset.cache import CachedLatents, latents_path, read_latents, write_latents
from library.dataset.cache_check import ABSENT, OTHER_VAE, Finding, WantedLatents, examine
from library.dataset.dataset import TrainingDataset
from library.errors import UserError, counted, quoted_list
from library.families.base import ModelFamily
from library.leftovers import remove_leftovers
from library.options.groups import DatasetOptions
from library.training.encoding import encode_pictures
from library.training.vae_check import VaeCheck

logger = logging.getLogger(__name__)

Item = TypeVar("Item")

NUM_READERS = 8  # threads that examine files, which wait for the disk


def cache_latents(
    dataset: TrainingDataset, family: ModelFamily, options: DatasetOptions, accelerator: Accelerator
) -> None:
    """Give every record its latents; with --cache_latents_to_disk valid files are used and missing ones written.

    Processes share the work on files. What stays in memory each of them computes for itself.
    """
    in_memory = [index for index, repeats in enumerate(dataset.repeats) if repeats]  # 0: beyond the balance
    broken = []
    if options.cache_latents_to_disk:
        files, in_memory = files_of(dataset, in_memory, family.name)
        broken += cache_on_disk(dataset, family, options, accelerator, files)
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


def files_of(dataset: TrainingDataset, indices: list[int], suffix: str) -> tuple[dict[int, Path], list[int]]:
    """The file of each record's latents, and the records that cannot have one.

    The name tells neither a picture's ending nor its bucket; of two records that differ there, the first has the file.
    """
    wanted_of: dict[Path, WantedLatents] = {}
    files: dict[int, Path] = {}
    crowded_out = []
    for index in indices:
        wanted = dataset.wanted_latents(index)
        path = latents_path(wanted.picture, wanted.original_size_wh, suffix)
        if wanted_of.setdefault(path, wanted) == wanted:
            files[index] = path
        else:
            crowded_out.append(index)
    if crowded_out:
        logger.warning(
            "the latents of %s stay in memory: a picture of the same name, or the same one in another dataset, needs "
            "their file",
            counted(len(crowded_out), "picture"),
        )
    return files, crowded_out


def cache_on_disk(
    dataset: TrainingDataset,
    family: ModelFamily,
    options: DatasetOptions,
    accelerator: Accelerator,
    files: dict[int, Path],
) -> list[int]:
    """Write the latents that are missing or of no use; returns the records of which the VAE made NaN."""
    vae = VaeCheck(family)
    if accelerator.is_main_process:
        remove_leftovers({path.parent for path in files.values()})
    owners = sorted({path: index for index, path in files.items()}.values())  # one record for each file
    mine = owners[accelerator.process_index :: accelerator.num_processes]
    if options.skip_cache_check:
        reasons = {index: ABSENT for index in mine if not files[index].is_file()}
    else:
        reasons = reasons_to_make(dataset, files, mine, vae, accelerator)
    found = gather_object(list(reasons.items()))
    log_findings("latents", len(owners), Counter(reason for _, reason in found))
    require_pictures(dataset, sorted(index for index, _ in found))
    to_make = sorted(index for index, _ in found)[accelerator.process_index :: accelerator.num_processes]
    sketch = vae.sketch if to_make else None

    def write(index: int, cached: CachedLatents) -> None:
        write_latents(files[index], cached, dataset.wanted_latents(index).origin(sketch))

    broken = encode_pictures(dataset, family.vae, to_make, options, accelerator, write)
    dataset.latents_paths.update(files)
    return gather_object(broken)


def reasons_to_make(
    dataset: TrainingDataset, files: dict[int, Path], indices: list[int], vae: VaeCheck, accelerator: Accelerator
) -> dict[int, str]:
    """The records whose files cannot be used, and why."""
    findings: dict[int, Finding] = {}
    hidden = not accelerator.is_local_main_process
    with (
        ThreadPoolExecutor(NUM_READERS) as pool,
        tqdm(total=len(indices), desc="checking latents", unit="files", disable=hidden, delay=1) as bar,
    ):
        found = pool.map(lambda index: examine(files[index], dataset.wanted_latents(index)), indices)
        for index, finding in zip(indices, found, strict=True):
            findings[index] = finding
            bar.update()
    usable = [index for index, finding in findings.items() if finding.reason is None]
    of_known_vae = [index for index in usable if findings[index].vae is not None]
    others = [index for index in usable if findings[index].vae is None]
    reasons = {index: finding.reason for index, finding in findings.items() if finding.reason}
    reasons |= {index: OTHER_VAE for index in of_known_vae if not vae.made(findings[index].vae)}
    comparable = [index for index in others if not dataset.scanned.records[index].is_gone]
    if not all(vae.may_have_made(read_latents(files[i]).latents, dataset.image(i)) for i in spread(comparable)):
        reasons |= dict.fromkeys(others, OTHER_VAE)
    return reasons


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
