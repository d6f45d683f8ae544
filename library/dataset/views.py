"""What one training step sees of a picture: caption, pixels and mask of a draw, as arrays. Needs no torch."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from library.dataset import images
from library.dataset.buckets import BucketChoice
from library.dataset.captions import process_caption
from library.dataset.config import SubsetOptions
from library.dataset.sampler import Draw
from library.dataset.scan import ScannedDataset, unreadable_reason
from library.errors import UserError


@dataclass(frozen=True)
class View:
    """One draw as it is seen."""

    caption: str
    flipped: bool
    pixels: np.ndarray | None  # [H, W, 3] uint8 at the size of the bucket; None where latents take their place
    mask: np.ndarray | None  # [H, W] float32 in [0, 1]; None where the whole picture counts


class Views:
    """Gives the View of a Draw; everything random about it comes from the draw's seed."""

    def __init__(self, scanned: ScannedDataset, choices: Sequence[BucketChoice], max_train_steps: int):
        self.scanned = scanned
        self.choices = choices
        self.max_train_steps = max_train_steps

    def view(self, draw: Draw, with_picture: bool = True) -> View:
        """What the draw's step sees; without its picture, which then is not read, where there are latents of it."""
        subset, rng = self.subset(draw.index), random.Random(draw.seed)
        flipped = subset.flip_aug and rng.random() < 0.5
        caption = process_caption(
            self.scanned.records[draw.index].caption,
            subset,
            step=draw.step,
            epoch=draw.epoch,
            max_train_steps=self.max_train_steps,
            rng=rng,
        )
        if not with_picture:
            return View(caption, flipped, None, None)
        pixels, mask = self.pixels(draw.index, rng if subset.random_crop else None)
        if flipped:
            pixels, mask = images.flip(pixels), None if mask is None else images.flip(mask)
        if subset.color_aug:
            pixels = images.color_augmented(pixels, rng)
        return View(caption, flipped, pixels, mask)

    def pixels(self, index: int, random_crop: random.Random | None = None) -> tuple[np.ndarray, np.ndarray | None]:
        """The picture [H, W, 3] uint8 at the size of its bucket, and its mask [H, W] float32, cut the same way."""
        record, choice = self.scanned.records[index], self.choices[index]
        interpolation = self.scanned.spec_of(record).resize_interpolation
        image = _read(images.load_image, record.path)
        sizes = (choice.resized_wh, choice.bucket_wh)
        pixels, left_top = images.resize_and_crop(image, *sizes, interpolation, random_crop)
        if not self.is_masked(index):
            return pixels, None
        from_alpha = record.mask_path is None
        mask = _read(images.load_mask, record.path if from_alpha else record.mask_path, from_alpha)
        return pixels, images.fit_mask(mask, *sizes, left_top)

    def is_masked(self, index: int) -> bool:
        """Whether a mask weighs the loss of this record."""
        return self.subset(index).alpha_mask or self.scanned.records[index].mask_path is not None

    def subset(self, index: int) -> SubsetOptions:
        """The subset of a record."""
        return self.scanned.subsets[self.scanned.records[index].subset]


def _read(load: Callable[..., np.ndarray], path: Path, *arguments: object) -> np.ndarray:
    try:
        return load(path, *arguments)
    except Exception as error:  # Pillow's readers raise many kinds on damaged files
        raise UserError(f"1 picture cannot be read: {path} ({unreadable_reason(path, error)})") from error
