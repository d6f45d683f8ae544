"""The loss on pictures that are not trained, on the same noise and timesteps every time."""

import logging
from collections.abc import Iterator
from typing import Protocol

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from library.dataset.dataset import TrainingDataset
from library.dataset.loader import build_loader
from library.dataset.sampler import derived_seed
from library.families.base import Batch
from library.options.groups import TrainNetworkOptions
from library.training.denoising import NUM_TIMESTEPS

logger = logging.getLogger(__name__)

NUM_VALIDATION_TIMESTEPS = 4


class Validated(Protocol):
    """What can be validated."""

    def resting_mode(self) -> None: ...

    def validation_losses(self, batch: Batch, timesteps: list[int]) -> Tensor: ...  # [T, B]


def validation_timesteps(options: TrainNetworkOptions) -> list[int]:
    """Equal distances apart inside [min_timestep, max_timestep]: 200, 400, 600 and 800 for all of it."""
    low, high = options.min_timestep or 0, options.max_timestep or NUM_TIMESTEPS
    between = range(1, NUM_VALIDATION_TIMESTEPS + 1)
    return [int(low + (high - low) * i / (NUM_VALIDATION_TIMESTEPS + 1)) for i in between]


class Validation:
    """The held-out pictures of a run, and when they are looked at."""

    def __init__(self, dataset: TrainingDataset, options: TrainNetworkOptions, accelerator: Accelerator):
        self.accelerator = accelerator
        self.every_n_steps, self.every_n_epochs = options.validate_every_n_steps, options.validate_every_n_epochs or 1
        self.timesteps = validation_timesteps(options)
        self.seed = dataset.seed if options.validation_seed is None else options.validation_seed
        batches = list(dataset.sampler())[: options.max_validation_steps]
        self.numbers = range(accelerator.process_index, len(batches), accelerator.num_processes)  # of this process
        self.loader = build_loader(dataset, [batches[n] for n in self.numbers], options, accelerator.device)

    def due_at_step(self, step: int) -> bool:
        return bool(self.every_n_steps) and step % self.every_n_steps == 0

    def due_at_epoch(self, epoch: int) -> bool:
        return epoch % self.every_n_epochs == 0

    @torch.no_grad()
    def loss(self, validated: Validated) -> float:
        """The mean over all held-out pictures and timesteps; training's random numbers stay as they are."""
        validated.resting_mode()
        total, num_losses = torch.zeros((), device=self.accelerator.device), 0
        cuda = [self.accelerator.device] if self.accelerator.device.type == "cuda" else []
        with torch.random.fork_rng(cuda):
            for number, batch in self._batches():
                torch.manual_seed(derived_seed(self.seed, "validation", number))
                losses = validated.validation_losses(batch.to(self.accelerator.device), self.timesteps)
                total, num_losses = total + losses.sum(), num_losses + losses.numel()
        total, num_losses = self.accelerator.reduce(torch.stack([total, total.new_tensor(num_losses)]), "sum").tolist()
        return total / num_losses

    def _batches(self) -> Iterator[tuple[int, Batch]]:
        bar = tqdm(self.loader, desc="validation", leave=False, disable=not self.accelerator.is_local_main_process)
        return zip(self.numbers, bar, strict=True)
