"""Where training's random numbers come from: seed and place in the data alone, whatever ran before and beside it."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from library.dataset.sampler import derived_seed
from library.dataset.share import Share


@dataclass(frozen=True)
class BatchRandomness:
    """Random numbers for one batch. Every process draws those of the global batch, and takes those of its rows.

    Without generators they are torch's own, and without a share the batch is the global one.
    """

    generator: torch.Generator | None = None  # of the device
    cpu_generator: torch.Generator | None = None  # of what the CPU must know without waiting
    share: Share | None = None

    def size(self, count: int) -> int:
        """Rows of the global batch, of which there are `count` here."""
        return count if self.share is None or self.share.is_whole else self.share.size

    def rows(self, values: Tensor) -> Tensor:
        """Those of the global batch that are here."""
        whole = self.share is None or self.share.is_whole
        return values if whole else values[self.share.first : self.share.stop]

    def of_all(self, values: Tensor) -> Tensor:
        """The rows of the global batch from those of each process; all must call this."""
        if self.share is None or self.share.is_whole:
            return values
        gathered = values.new_zeros(self.share.size, *values.shape[1:])
        if self.share.weight:
            gathered[self.share.first : self.share.stop] = values
        torch.distributed.all_reduce(gathered)
        return gathered

    def normal_for_all(self, like: Tensor) -> Tensor:
        """Standard normal noise for the global batch, whose rows are like these."""
        shape = self.size(len(like)), *like.shape[1:]
        return torch.randn(shape, generator=self.generator, device=like.device, dtype=like.dtype)

    def normal_like(self, like: Tensor) -> Tensor:
        """Standard normal noise for the rows that are here."""
        return self.rows(self.normal_for_all(like))

    def uniform(self, device: torch.device) -> Tensor:
        """One number [1] in [0, 1) for the global batch."""
        return torch.rand(1, generator=self.generator, device=device)


class TrainingRandomness:
    """The random numbers of a run, which begin anew at every batch."""

    def __init__(self, device: torch.device, rank: int):
        self.device, self.rank = device, rank
        self.generator, self.cpu_generator = torch.Generator(device), torch.Generator()

    def begin(self, share: Share) -> BatchRandomness:
        """Those of a batch; also seeds what draws without a generator (dropout), differently in each process."""
        self.generator.manual_seed(share.seed)
        self.cpu_generator.manual_seed(share.seed + 1)
        seed_all(derived_seed(share.seed, self.rank), self.device)
        return BatchRandomness(self.generator, self.cpu_generator, share)


def seed_all(seed: int, device: torch.device) -> None:
    """Seed Python's, numpy's and torch's generators; `torch.manual_seed` takes ten times as long."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


def noise_of_pictures(seed: int, indices: Sequence[int], variant: str) -> Callable[[Tensor], Tensor]:
    """Draws the noise with which latents are sampled, the same for a picture whichever are encoded beside it."""

    def noise_like(mean: Tensor) -> Tensor:
        generator = torch.Generator()
        rows = []
        for index in indices:
            generator.manual_seed(derived_seed(seed, "latents", variant, index))
            rows.append(torch.randn(mean.shape[1:], generator=generator))
        return torch.stack(rows).to(mean)

    return noise_like
