"""Latents of pictures: read and cropped in threads, encoded meanwhile, and kept in a thread behind that."""

import os
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from library.dataset.cache import CachedLatents
from library.dataset.dataset import TrainingDataset
from library.families.vae import Vae
from library.options.groups import DatasetOptions
from library.parallel import ahead, finished_behind, threads
from library.training.randomness import noise_of_pictures

NUM_AHEAD = 2  # pictures in memory for each thread that reads them, besides those of the next batch
NUM_BEHIND = 8  # batches that may wait for the device and the disk


def encode_pictures(
    dataset: TrainingDataset,
    vae: Vae,
    indices: list[int],
    options: DatasetOptions,
    accelerator: Accelerator,
    keep: Callable[[int, CachedLatents], None],
) -> list[int]:
    """Have `keep` called, in one other thread, with the latents of each record; returns those the VAE made NaN of.

    How many threads there are and which is faster changes nothing but the time that it takes.
    """
    num_threads = max(1, min(options.max_data_loader_n_workers, os.cpu_count() or 1))
    batches = batches_of_one_size(dataset, indices, options.vae_batch_size)
    in_order = [index for batch in batches for index in batch]
    limit = NUM_AHEAD * num_threads + options.vae_batch_size
    broken: list[int] = []

    def finish(batch: list[int], latents: Tensor, masks: list[np.ndarray | None]) -> None:
        for index, cached in taken_off_device(dataset, batch, latents, masks):
            if cached is None:
                broken.append(index)
            else:
                keep(index, cached)

    hidden = not indices or not accelerator.is_local_main_process
    with (
        tqdm(total=len(indices), desc="caching latents", unit="pictures", disable=hidden) as bar,
        threads(num_threads) as readers,
        finished_behind(NUM_BEHIND) as behind,
    ):
        pictures = ahead(readers, dataset.views.pixels, in_order, limit)
        for batch in batches:
            pixels, masks = zip(*(next(pictures) for _ in batch), strict=True)
            behind(finish, batch, encoded(dataset, vae, batch, pixels), masks)
            bar.update(len(batch))  # never in the thread: a Ctrl-C inside tqdm leaves its lock taken
    return broken


def encoded(dataset: TrainingDataset, vae: Vae, indices: list[int], pixels: Sequence[np.ndarray]) -> Tensor:
    """[B, C, h, w] of pictures, or [B, 2 C, h, w] with those of the mirrored ones behind; not waited for."""
    images = model_input(np.stack(pixels), vae.target.device)
    latents = vae.encode(images, noise_of_pictures(dataset.seed, indices, "upright"))
    if not flips(dataset, indices[0]):
        return latents
    flipped = vae.encode(images.flip(-1), noise_of_pictures(dataset.seed, indices, "mirrored"))
    return torch.cat([latents, flipped], dim=1)


def taken_off_device(
    dataset: TrainingDataset, indices: list[int], latents: Tensor, masks: list[np.ndarray | None]
) -> Iterator[tuple[int, CachedLatents | None]]:
    """What is kept of each record of a batch; None where the latents are not finite."""
    for index, row, mask in zip(indices, latents.cpu().numpy(), masks, strict=True):
        upright, flipped = np.split(row, 2) if flips(dataset, index) else (row, None)
        yield index, dataset.cached_latents(index, upright, flipped, mask) if np.isfinite(row).all() else None


def model_input(pixels: np.ndarray, device: torch.device) -> Tensor:
    """[B, H, W, 3] uint8 -> [B, 3, H, W] float32 in [-1, 1] on the device, to the bit as `images.to_model_input`."""
    images = torch.from_numpy(pixels)
    images = images.pin_memory() if device.type == "cuda" else images
    images = images.to(device, non_blocking=True).permute(0, 3, 1, 2).float(memory_format=torch.contiguous_format)
    byte = torch.full((), 255.0, device=device)  # a GPU multiplies by the reciprocal of a plain number
    return images.div_(byte).sub_(0.5).div_(0.5)


def flips(dataset: TrainingDataset, index: int) -> bool:
    """Whether a record is also seen mirrored."""
    return dataset.scanned.subsets[dataset.scanned.records[index].subset].flip_aug


def batches_of_one_size(dataset: TrainingDataset, indices: list[int], batch_size: int) -> list[list[int]]:
    """Records whose pictures can be stacked: of one bucket and one answer to `flips`."""
    groups: dict[tuple, list[int]] = {}
    for index in indices:
        groups.setdefault((dataset.choices[index].bucket_wh, flips(dataset, index)), []).append(index)
    return [group[i : i + batch_size] for group in groups.values() for i in range(0, len(group), batch_size)]
