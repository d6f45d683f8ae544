"""From batches of draws to a DataLoader that gives them to training."""

import os
import signal
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import DataLoader

from library.dataset.dataset import TrainingDataset
from library.dataset.own_dataset import OwnDataset
from library.dataset.sampler import BucketSampler, Draw, derived_seed
from library.dataset.share import share_of
from library.dataset.steady_loader import SteadyLoader
from library.errors import UserError
from library.families.base import Batch

STOP_SIGNALS = ("SIGINT", "SIGTERM", "SIGBREAK")  # SIGBREAK is a console break of Windows


class SharedBatches:
    """The part of this process in each batch of a sampler."""

    def __init__(self, sampler: BucketSampler, num_processes: int, rank: int):
        self.sampler, self.num_processes, self.rank = sampler, num_processes, rank
        self.start = 0  # batches to leave out of the epoch; a DataLoader may iterate twice

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[list[Draw]]:
        epoch = self.sampler.epoch
        for number, draws in enumerate(self.sampler):
            if number >= self.start:
                seed = derived_seed(self.sampler.seed, epoch, "batch", number)
                share = share_of(self.rank, self.num_processes, len(draws), seed)
                yield [replace(draw, share=share) for draw in draws[share.first : share.stop]]


def build_loader(
    dataset: TrainingDataset | OwnDataset, batches: Iterable[list[Draw]], options: Any, device: torch.device
) -> DataLoader:
    """Workers only prefetch: what they give depends on the draws alone, so their number changes no result.

    With cached latents there is nothing to wait for, and starting workers (on Windows each imports torch) costs more.
    """
    cached = dataset.latents or dataset.latents_paths
    num_workers = 0 if cached else min(options.max_data_loader_n_workers, os.cpu_count() or 1)
    return SteadyLoader(
        dataset,
        batches,
        collate_fn=dataset.collate,
        num_workers=num_workers,
        persistent_workers=options.persistent_data_loader_workers and num_workers > 0,
        pin_memory=device.type == "cuda",
        worker_init_fn=ignore_stop_signals,
        generator=torch.Generator(),  # its own, so that starting an epoch draws nothing from training's
    )


def ignore_stop_signals(worker: int) -> None:
    """A Ctrl-C in the terminal reaches workers too; the run still needs them for its last step."""
    for name in STOP_SIGNALS:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def batches_of(loader: DataLoader) -> Iterator[Batch]:
    """The loader's batches; a mistake found in a worker keeps its own sentence."""
    try:
        yield from loader
    except UserError as error:
        raise UserError(str(error).strip().splitlines()[-1].split("UserError: ")[-1]) from error
