"""What one training step sees of a picture: caption, pixels and mask of a draw, as arrays. Needs no torch."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from library.dataset import images
from library.dataset.buckets import BucketChoice
from library.dataset.captions import process_caption
from library.dataset.config import Size, SubsetOptions
from library.dataset.faces import face_crop, face_of
from library.dataset.picture_files import unreadable_reason
from library.dataset.sampler import Draw
from library.dataset.scan import ScannedDataset
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

    def __init__(
        self, scanned: ScannedDataset, choices: Sequence[BucketChoice], max_train_steps: int, fast_jpeg: bool = False
    ):
        self.scanned = scanned
        self.choices = choices
        self.max_train_steps = max_train_steps
        self.fast_jpeg = fast_jpeg

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
        pixels, mask = self.pixels(draw.index, rng)
        if flipped:
            pixels, mask = images.flip(pixels), None if mask is None else images.flip(mask)
        if subset.color_aug:
            pixels = images.color_augmented(pixels, rng)
        return View(caption, flipped, pixels, mask)

    def pixels(self, index: int, rng: random.Random | None = None) -> tuple[np.ndarray, np.ndarray | None]:
        """The picture [H, W, 3] uint8 at the size of its bucket, and its mask [H, W] float32, cut the same way.

        Crops are centred without rng; with it, as the subset says.
        """
        record, choice, subset = self.scanned.records[index], self.choices[index], self.subset(index)
        resized_wh, left_top = self._face_crop(index, rng) if rng else (choice.resized_wh, None)
        image = _read(images.load_image, record.path, False, resized_wh if self.fast_jpeg else None)
        sizes = (resized_wh, choice.bucket_wh)
        random_crop = rng if subset.random_crop else None
        pixels, left_top = images.resize_and_crop(image, *sizes, subset.resize_interpolation, random_crop, left_top)
        if not self.is_masked(index):
            return pixels, None
        from_alpha = record.mask_path is None
        mask = _read(images.load_mask, record.path if from_alpha else record.mask_path, from_alpha)
        return pixels, images.fit_mask(mask, *sizes, left_top)

    def resizing(self, index: int) -> str:
        """How a record's picture gets the size that it is cropped from: "597x448 area"."""
        (width, height), (from_width, from_height) = self.choices[index].resized_wh, self.scanned.records[index].size_wh
        is_reduced = self.fast_jpeg and min(from_width // width, from_height // height) > 1
        is_fast = is_reduced and self.scanned.records[index].path.suffix.lower() in (".jpg", ".jpeg")
        interpolation = self.subset(index).resize_interpolation or "default"
        return f"{width}x{height} {interpolation}{' of a fast JPEG' if is_fast else ''}"

    def is_masked(self, index: int) -> bool:
        """Whether a mask weighs the loss of this record."""
        return self.subset(index).alpha_mask or self.scanned.records[index].mask_path is not None

    def subset(self, index: int) -> SubsetOptions:
        """The subset of a record."""
        return self.scanned.subsets[self.scanned.records[index].subset]

    def _face_crop(self, index: int, rng: random.Random) -> tuple[Size, tuple[int, int] | None]:
        """The size to which a picture is resized, and left and top of the crop where it goes by a face."""
        record, choice, subset = self.scanned.records[index], self.choices[index], self.subset(index)
        face = face_of(record.path) if subset.face_crop_aug_range else None
        if face is None or self.scanned.specs[subset.dataset].enable_bucket:
            return choice.resized_wh, None
        return face_crop(
            face, record.size_wh, choice.bucket_wh, subset.face_crop_aug_range, rng, at_random=subset.random_crop
        )


def _read(load: Callable[..., np.ndarray], path: Path, *arguments: object) -> np.ndarray:
    try:
        return load(path, *arguments)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers raise many kinds on damaged files
        raise UserError(f"1 picture cannot be read: {path} ({unreadable_reason(path, error)})") from error
