"""Batches from a dataset class of the user's own (`--dataset_class`), whose items are whole batches."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from library.dataset.buckets import BucketChoice
from library.dataset.sampler import BucketSampler, Draw, derived_seed
from library.dataset.scan import ScannedDataset
from library.dataset.share import Share
from library.errors import UserError
from library.families.base import Batch


class OwnDataset(torch.utils.data.Dataset[Batch]):
    """Gives the Batch of a Draw; an item is a mapping with the names that kohya's datasets have.

    `captions`, and `images` [B, 3, H, W] in [-1, 1] or `latents` [B, C, h, w], must be there; `loss_weights` [B],
    `alpha_masks` [B, H, W], `original_sizes_hw`, `crop_top_lefts` and `target_sizes_hw` [B, 2] may be.
    """

    def __init__(self, scanned: ScannedDataset, options: Any, seed: int, max_train_steps: int):
        self.scanned, self.own, self.seed = scanned, scanned.own, seed
        self.name = f"--dataset_class {options.dataset_class}"
        self.choices: list[BucketChoice] = []
        self.repeats: list[int] = []
        self.latents: dict = {}
        self.latents_paths: dict = {}
        if hasattr(self.own, "set_max_train_steps"):
            self.own.set_max_train_steps(max_train_steps)

    def __len__(self) -> int:
        return len(self.own)

    def __getitem__(self, draw: Draw) -> Batch:
        for method, value in (("set_current_epoch", draw.epoch), ("set_current_step", draw.step)):
            if hasattr(self.own, method):
                getattr(self.own, method)(value)
        with randomness_of(draw.seed):
            item = self.own[draw.index]
        return replace(self._batch(item, draw.index), share=draw.share and whole_batch(draw.share))

    @property
    def num_train_images(self) -> int:
        return getattr(self.own, "num_train_images", 0)

    @property
    def num_reg_images(self) -> int:
        return getattr(self.own, "num_reg_images", 0)

    def sampler(self, gradient_accumulation_steps: int = 1, num_processes: int = 1) -> BucketSampler:
        """The items in an order that depends on seed and epoch alone; a batch is one of them for each process."""
        count = len(self)
        return BucketSampler([0] * count, [1] * count, 1, self.seed, gradient_accumulation_steps, num_processes)

    def distinct_captions(self) -> None:
        """What captions there will be is not known."""

    @staticmethod
    def collate(batches: Sequence[Batch]) -> Batch:
        return batches[0]

    def _batch(self, item: Any, index: int) -> Batch:
        try:
            images, latents, captions = item.get("images"), item.get("latents"), list(item["captions"])
            given = images if latents is None else latents
            count, *_, height, width = given.shape
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{self.name}: item {index} must be a dict with captions and images [B, 3, H, W] or latents, "
                f"got a {type(item).__name__}"
            ) from error
        if count != len(captions):
            raise UserError(f"{self.name}: item {index} has {count} pictures and {len(captions)} captions")
        scale = 1 if latents is None else 8
        whole = torch.tensor([height * scale, width * scale]).expand(count, 2)

        def sizes(name: str, default: Tensor) -> Tensor:
            return default if item.get(name) is None else torch.as_tensor(item[name])

        weights = item.get("loss_weights")
        return Batch(
            captions=captions,
            loss_weights=torch.ones(count) if weights is None else torch.as_tensor(weights, dtype=torch.float32),
            images=images if latents is None else None,
            latents=latents,
            conds=None,
            alpha_masks=item.get("alpha_masks"),
            original_sizes_hw=sizes("original_sizes_hw", whole),
            crop_top_lefts=sizes("crop_top_lefts", torch.zeros_like(whole)),
            target_sizes_hw=sizes("target_sizes_hw", whole),
        )


def whole_batch(share: Share) -> Share:
    """The share of a process whose item, one row of the global batch, is a batch with randomness of its own."""
    return Share(derived_seed(share.seed, share.first), 1, 0, 1, share.weight)


@contextmanager
def randomness_of(seed: int) -> Iterator[None]:
    """All random numbers inside come from the seed, and those of training go on undisturbed behind.

    Those of a GPU are left alone: training draws its noise from them, and batches are made on the CPU.
    """
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([]):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
