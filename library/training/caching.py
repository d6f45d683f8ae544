"""Latents computed once: from the VAE or from kohya's .npz files, kept in memory or on disk."""

import logging
from pathlib import Path

import torch
from tqdm.auto import tqdm

from library.dataset.cache import is_valid, latents_path, write_latents
from library.dataset.dataset import TrainingDataset
from library.errors import UserError, quoted_list
from library.families.base import ModelFamily
from library.options.groups import DatasetOptions

logger = logging.getLogger(__name__)


def cache_latents(dataset: TrainingDataset, family: ModelFamily, options: DatasetOptions, is_main: bool) -> None:
    """Give every record its latents; with --cache_latents_to_disk valid files are used and missing ones written."""
    to_disk = options.cache_latents_to_disk
    records, missing = dataset.scanned.records, []
    for index, record in enumerate(records):
        if not dataset.repeats[index]:  # a regularisation picture beyond the balance
            continue
        path = latents_path(record.path, record.size_wh, family.name)
        if to_disk and is_usable(path, dataset, index, options.skip_cache_check):
            dataset.latents_paths[index] = path
        else:
            missing.append(index)
    if to_disk:
        logger.info(
            "latents: %d of %d pictures have theirs on disk",
            len(dataset.latents_paths),
            len(dataset.latents_paths) + len(missing),
        )
    if gone := [str(records[index].path) for index in missing if records[index].is_gone]:
        raise UserError(f"pictures are gone, and no latents on disk fit this run in their place: {quoted_list(gone)}")
    broken = []
    with tqdm(total=len(missing), desc="caching latents", unit="pictures", disable=not is_main or not missing) as bar:
        for batch in batches_of_one_size(dataset, missing, options.vae_batch_size):
            broken += encode_and_keep(dataset, family, batch, to_disk)
            bar.update(len(batch))
    if broken:
        raise UserError(f"the VAE made NaN of {quoted_list(broken)}; use --no_half_vae, or another --vae")


def is_usable(path: Path, dataset: TrainingDataset, index: int, skip_check: bool) -> bool:
    """Whether a record's latents are on disk, whole and of its bucket's size (unchecked with --skip_cache_check)."""
    if skip_check:
        return path.is_file()
    return is_valid(path, dataset.choices[index].bucket_wh, flips(dataset, index), dataset.is_masked(index))


def flips(dataset: TrainingDataset, index: int) -> bool:
    """Whether a record is also seen mirrored."""
    return dataset.scanned.subsets[dataset.scanned.records[index].subset].flip_aug


def batches_of_one_size(dataset: TrainingDataset, indices: list[int], batch_size: int) -> list[list[int]]:
    """Records whose pictures can be stacked: of one bucket and one answer to `flips`."""
    groups: dict[tuple, list[int]] = {}
    for index in indices:
        groups.setdefault((dataset.choices[index].bucket_wh, flips(dataset, index)), []).append(index)
    return [group[i : i + batch_size] for group in groups.values() for i in range(0, len(group), batch_size)]


def encode_and_keep(dataset: TrainingDataset, family: ModelFamily, batch: list[int], to_disk: bool) -> list[str]:
    """Encode pictures and keep their latents; returns the paths of those the VAE made NaN of."""
    images = torch.stack([dataset.image(index) for index in batch])
    latents = family.encode_images(images)
    flipped = family.encode_images(images.flip(-1)) if flips(dataset, batch[0]) else None
    broken = []
    for position, index in enumerate(batch):
        record = dataset.scanned.records[index]
        if not latents[position].isfinite().all():
            broken.append(str(record.path))
            continue
        cached = dataset.set_cached_latents(index, latents[position], None if flipped is None else flipped[position])
        if to_disk:
            path = latents_path(record.path, record.size_wh, family.name)
            write_latents(path, cached)
            dataset.latents_paths[index] = path
            del dataset.latents[index]
    return broken
