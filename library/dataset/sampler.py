"""Which pictures make which batch: an order that depends on seed and epoch alone. Needs no torch."""

import hashlib
import math
import random
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

from library.dataset.buckets import BucketChoice
from library.dataset.scan import ScannedDataset
from library.dataset.share import Share


@dataclass(frozen=True)
class Draw:
    """One picture of one batch."""

    index: int  # of the record
    seed: int  # of everything random about this draw
    epoch: int  # from 1
    step: int  # optimizer step, from 0
    share: Share | None = None  # of the process that takes it; None outside of training


class BucketSampler:
    """Batches of draws, each from one bucket, in an order that depends on seed and epoch alone.

    Several processes share each batch, so it has `num_processes` times the batch size, as that of one process would.
    The last batch of a bucket may be short.
    """

    def __init__(
        self,
        bucket_of: Sequence[Hashable],
        repeats: Sequence[int],
        batch_size: int | Sequence[int],  # in each process: one for all, or one a record
        seed: int,
        gradient_accumulation_steps: int = 1,
        num_processes: int = 1,
    ):
        self.members: dict[Hashable, list[int]] = {}
        self.num_per_batch: dict[Hashable, int] = {}
        for index, (bucket, num_repeats) in enumerate(zip(bucket_of, repeats, strict=True)):
            if num_repeats:
                self.members.setdefault(bucket, []).extend([index] * num_repeats)
                in_process = batch_size if isinstance(batch_size, int) else batch_size[index]
                self.num_per_batch[bucket] = in_process * num_processes
        self.seed = seed
        self.batches_per_step = gradient_accumulation_steps
        self.epoch = 1

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 1, that the next iteration goes through."""
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(math.ceil(len(indices) / self.num_per_batch[bucket]) for bucket, indices in self.members.items())

    def __iter__(self) -> Iterator[list[Draw]]:
        epoch = self.epoch
        position, steps_before = 0, (epoch - 1) * math.ceil(len(self) / self.batches_per_step)
        for number, batch in enumerate(self._shuffled_batches(epoch)):
            step = steps_before + number // self.batches_per_step
            seeds = [derived_seed(self.seed, epoch, position + i) for i in range(len(batch))]
            yield [Draw(index, seed, epoch, step) for index, seed in zip(batch, seeds, strict=True)]
            position += len(batch)

    def _shuffled_batches(self, epoch: int) -> list[list[int]]:
        rng = random.Random(derived_seed(self.seed, epoch, "order"))
        batches = []
        for bucket in sorted(self.members):
            indices = list(self.members[bucket])
            rng.shuffle(indices)
            size = self.num_per_batch[bucket]
            batches += [indices[i : i + size] for i in range(0, len(indices), size)]
        rng.shuffle(batches)
        return batches


def sampler_of(
    scanned: ScannedDataset,
    choices: Sequence[BucketChoice],
    repeats: Sequence[int],
    seed: int,
    gradient_accumulation_steps: int = 1,
    num_processes: int = 1,
) -> BucketSampler:
    """The batches of all datasets; none mixes datasets or sizes, and each dataset has its own batch size."""
    datasets = [scanned.subsets[record.subset].dataset for record in scanned.records]
    return BucketSampler(
        [(number, choice.bucket_wh) for number, choice in zip(datasets, choices, strict=True)],
        repeats,
        [scanned.specs[number].batch_size for number in datasets],
        seed,
        gradient_accumulation_steps,
        num_processes,
    )


def derived_seed(*parts: int | str) -> int:
    """A number of 63 bits that depends on the parts alone, the same in every process and version."""
    digest = hashlib.sha256(" ".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
