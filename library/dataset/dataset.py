"""From draws to batches: pictures or cached latents, captions and sizes as one training step sees them."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from library.dataset import images, text_cache
from library.dataset.array_files import KnownArrays
from library.dataset.buckets import BucketChoice, choose_buckets_of, repeats_of
from library.dataset.cache import CachedLatents
from library.dataset.cache_check import WantedLatents
from library.dataset.captions import possible_captions
from library.dataset.config import SubsetOptions
from library.dataset.latent_files import LatentFiles, NpzLatents
from library.dataset.sampler import BucketSampler, Draw, sampler_of
from library.dataset.scan import ScannedDataset
from library.dataset.share import Share
from library.dataset.text_cache import TextOutputs, WantedText, read_text
from library.dataset.views import Views
from library.errors import UserError
from library.families.base import Batch

MAX_STAND_INS = 20  # pictures that are tried in place of one that is gone


@dataclass(frozen=True)
class Example:
    """One draw, ready to be stacked with others of its bucket."""

    caption: str
    loss_weight: float
    image: Tensor | None  # [3, H, W] in [-1, 1]; None where latents are cached
    latents: Tensor | None  # [C, h, w] as the VAE gives them, not scaled
    alpha_mask: Tensor | None  # [H, W] in [0, 1]; None where the whole picture counts
    original_size_hw: tuple[int, int]  # pixels
    crop_top_left: tuple[int, int]  # pixels
    target_size_hw: tuple[int, int]  # pixels
    conds: dict[str, Tensor] | None = None  # text encoder outputs as their file holds them, where they are cached
    preserves_output: bool = False  # whether the model without the network gives the target
    share: Share | None = None  # of its process in the global batch
    picture: str = ""  # its path, for messages
    left_out: tuple[str, ...] = ()  # what could not be read of the same batch, with the reasons


class TrainingDataset(torch.utils.data.Dataset[Example]):
    """Gives the Example of a Draw; everything random about it comes from the draw's seed, whatever the worker."""

    def __init__(self, scanned: ScannedDataset, options: Any, seed: int, max_train_steps: int):
        self.scanned = scanned
        self.seed = seed
        self.prior_loss_weight: float = options.prior_loss_weight
        self.choices: list[BucketChoice] = choose_buckets_of(scanned)
        self.repeats: list[int] = repeats_of(scanned)
        self.views = Views(scanned, self.choices, max_train_steps, options.fast_jpeg)
        self.latents: dict[int, CachedLatents] = {}  # record -> latents kept in memory
        self.latents_paths: dict[int, str] = {}  # record -> the place of its latents on disk
        self.latents_files: LatentFiles = NpzLatents()  # what reads them
        self.texts: dict[int, TextOutputs] = {}  # record -> text encoder outputs kept in memory
        self.text_paths: dict[int, Path] = {}  # record -> file of text encoder outputs on disk
        self._text_files = KnownArrays(text_cache.KEYS)

    @staticmethod
    def collate(examples: Sequence[Example]) -> Batch:
        return collate(examples)

    def __len__(self) -> int:
        """Pictures in an epoch, with repeats."""
        return sum(self.repeats)

    def __getitem__(self, draw: Draw) -> Example:
        record, choice, subset = self.scanned.records[draw.index], self.choices[draw.index], self._subset(draw.index)
        cached = self._cached(draw.index)
        view = self.views.view(draw, with_picture=cached is None)
        width, height = cached.original_size_wh if cached else record.size_wh
        left, top, right, _ = cached.crop_ltrb if cached else choice.crop_ltrb
        mask = view.mask
        if cached:
            mask = cached.alpha_mask if self.is_masked(draw.index) else None
        if cached and mask is not None and view.flipped:
            mask = images.flip(mask)
        return Example(
            caption=view.caption,
            loss_weight=self.prior_loss_weight if subset.is_reg else 1.0,
            image=None if view.pixels is None else torch.from_numpy(images.to_model_input(view.pixels)),
            latents=_latents(cached, view.flipped) if cached else None,
            alpha_mask=None if mask is None else torch.from_numpy(mask),
            original_size_hw=(height, width),
            crop_top_left=(int(top), int(choice.bucket_wh[0] - right if view.flipped else left)),
            target_size_hw=(choice.bucket_wh[1], choice.bucket_wh[0]),
            conds=self._conds(draw.index),
            preserves_output=subset.diff_output_preservation,
            share=draw.share,
            picture=str(record.path),
        )

    def __getitems__(self, draws: list[Draw]) -> list[Example]:
        """The Examples of a batch, without what has vanished or broken since the run began.

        Where nothing is left, another picture stands in, so that there are as many batches as ever.
        """
        left_out: list[str] = []
        examples = list(self._readable(draws, left_out))
        if not examples:
            examples = list(itertools.islice(self._readable(self._stand_ins(draws[0]), left_out), 1))
        if not examples:
            raise UserError(f"no picture can be read any more, is their drive still there? {left_out[0]}")
        share = draws[0].share and draws[0].share.with_rows(len(examples))
        return [replace(examples[0], left_out=tuple(left_out), share=share), *examples[1:]]

    @property
    def num_train_images(self) -> int:
        """Training pictures in an epoch, with repeats."""
        return sum(s.num_repeats for s in map(self._subset, range(len(self.repeats))) if not s.is_reg)

    @property
    def num_reg_images(self) -> int:
        """Regularisation pictures with repeats, before they are balanced with the training pictures."""
        return sum(s.num_repeats for s in map(self._subset, range(len(self.repeats))) if s.is_reg)

    def sampler(self, gradient_accumulation_steps: int = 1, num_processes: int = 1) -> BucketSampler:
        """The batches of every epoch, each for all processes together."""
        settings = (self.seed, gradient_accumulation_steps, num_processes)
        return sampler_of(self.scanned, self.choices, self.repeats, *settings)

    def image(self, index: int) -> Tensor:
        """A record's picture [3, H, W] in [-1, 1], centre-cropped and not augmented, as its latents are cached."""
        return torch.from_numpy(images.to_model_input(self.views.pixels(index)[0]))

    def distinct_captions(self) -> list[str] | None:
        """Every caption that training will see; None where captions change from draw to draw."""
        found: dict[str, None] = {}
        for index, repeats in enumerate(self.repeats):
            captions = possible_captions(self.scanned.records[index].caption, self._subset(index)) if repeats else []
            if captions is None:
                return None
            found |= dict.fromkeys(captions)
        return list(found)

    def is_masked(self, index: int) -> bool:
        """Whether a mask weighs the loss of this record."""
        return self.views.is_masked(index)

    def wanted_latents(self, index: int) -> WantedLatents:
        """What a record's latents must be, wherever they come from."""
        record, choice = self.scanned.records[index], self.choices[index]
        return WantedLatents(
            picture=record.path,
            original_size_wh=record.size_wh,
            bucket_wh=choice.bucket_wh,
            crop_ltrb=choice.crop_ltrb,
            resized=self.views.resizing(index),
            mirrored=self._subset(index).flip_aug,
            masked=self.is_masked(index),
            mask=record.mask_path,
            is_gone=record.is_gone,
        )

    def wanted_text(self, index: int, weighted: bool) -> WantedText:
        """What a record's text encoder outputs must be of; its caption must be the same in every draw."""
        record, subset = self.scanned.records[index], self._subset(index)
        (caption,) = possible_captions(record.caption, subset)
        return WantedText(
            caption=caption,
            weighted=weighted,
            is_whole_caption=caption == record.caption,
            picture=None if record.is_gone else record.path,
            caption_path=subset.metadata_file or record.path.with_name(f"{record.path.stem}{subset.caption_extension}"),
        )

    def cached_latents(
        self,
        index: int,
        latents: np.ndarray,
        flipped: np.ndarray | None = None,
        alpha_mask: np.ndarray | None = None,
    ) -> CachedLatents:
        """A record's latents [C, h, w] and mask [H, W] with its sizes, as they are kept in memory and on disk."""
        size_wh, crop_ltrb = self.scanned.records[index].size_wh, self.choices[index].crop_ltrb
        return CachedLatents(latents, size_wh, crop_ltrb, flipped, alpha_mask)

    def _subset(self, index: int) -> SubsetOptions:
        return self.views.subset(index)

    def _readable(self, draws: Iterable[Draw], left_out: list[str]) -> Iterator[Example]:
        """The Examples that can be read; why the others cannot goes into `left_out`."""
        for draw in draws:
            try:
                example = self[draw]
            except UserError as error:
                left_out += error.problems
            else:
                yield example

    def _stand_ins(self, draw: Draw) -> Iterator[Draw]:
        """Draws of other pictures, the next ones of the same bucket first, then the next ones of all."""
        others = [index for index, repeats in enumerate(self.repeats) if repeats and index != draw.index]
        others.sort(key=lambda index: (self.choices[index] != self.choices[draw.index], index < draw.index))
        return (replace(draw, index=index) for index in others[:MAX_STAND_INS])

    def _cached(self, index: int) -> CachedLatents | None:
        path = self.latents_paths.get(index)
        if path is None:
            return self.latents.get(index)
        cached, (width, height) = self.latents_files.read(path), self.choices[index].bucket_wh
        if cached.latents.shape[-2:] != (height // 8, width // 8):
            raise UserError(f"cached latents {path} are not of {width}x{height} pixels; delete the file")
        return cached

    def _conds(self, index: int) -> dict[str, Tensor] | None:
        path = self.text_paths.get(index)
        outputs = read_text(path, self._text_files) if path else self.texts.get(index)
        return outputs and {name: torch.from_numpy(value) for name, value in outputs.items()}


def collate(examples: Sequence[Example]) -> Batch:
    """The batch of examples of one bucket, all with pictures or all with latents."""
    return Batch(
        captions=[example.caption for example in examples],
        loss_weights=torch.tensor([example.loss_weight for example in examples]),
        images=_stacked([example.image for example in examples]),
        latents=_stacked([example.latents for example in examples]),
        conds=_conds(examples),
        alpha_masks=_masks(examples),
        original_sizes_hw=torch.tensor([example.original_size_hw for example in examples]),
        crop_top_lefts=torch.tensor([example.crop_top_left for example in examples]),
        target_sizes_hw=torch.tensor([example.target_size_hw for example in examples]),
        preserved_rows=[row for row, example in enumerate(examples) if example.preserves_output],
        share=examples[0].share,
        pictures=[example.picture for example in examples],
        left_out=[problem for example in examples for problem in example.left_out],
    )


def _masks(examples: Sequence[Example]) -> Tensor | None:
    """[B, H, W]; where some pictures of a batch have masks, the others count in full."""
    if all(example.alpha_mask is None for example in examples):
        return None
    whole = torch.ones(examples[0].target_size_hw)
    return torch.stack([whole if example.alpha_mask is None else example.alpha_mask for example in examples])


def _conds(examples: Sequence[Example]) -> dict[str, Tensor] | None:
    present = [example.conds for example in examples if example.conds is not None]
    assert len(present) in (0, len(examples)), "a batch mixes cached text encoder outputs with captions"
    return {name: torch.stack([conds[name] for conds in present]) for name in present[0]} if present else None


def _stacked(tensors: Sequence[Tensor | None]) -> Tensor | None:
    present = [tensor for tensor in tensors if tensor is not None]
    assert len(present) in (0, len(tensors)), "a batch mixes cached latents with pictures"
    return torch.stack(present) if present else None


def _latents(cached: CachedLatents, flipped: bool) -> Tensor:
    latents = cached.latents_flipped if flipped else cached.latents
    assert latents is not None, "--flip_aug needs cached latents of the mirrored picture"
    return torch.from_numpy(latents)
