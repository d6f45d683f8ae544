"""A picture of the whole dataset, bucket by bucket, as training sees it: `dataset_sheet.py`. Needs no torch."""

import io
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from library.dataset.audit import Audit, audit_of
from library.dataset.audit_memory import AuditMemory
from library.dataset.buckets import BucketChoice, choose_buckets_of, repeats_of
from library.dataset.caption_audit import tags_of
from library.dataset.config import Size
from library.dataset.images import load_image
from library.dataset.picture_files import open_picture
from library.dataset.picture_index import PictureIndex
from library.dataset.sampler import Draw, derived_seed, sampler_of
from library.dataset.scan import ScannedDataset
from library.dataset.sheet import BLANK, MAX_CAPTION_LINES, NO_CAPTION, marks_of, thumbnail
from library.dataset.validation import split_validation
from library.dataset.views import Views
from library.errors import UserError, counted
from library.options.groups import TrainNetworkOptions
from library.panels import BLACK, GREY, ORANGE, Line, Panel, Tile
from library.parallel import ahead, threads
from library.preflight import plan_of, read_dataset
from library.preparing.cropping import CENTRE, Crop, whole_with_crop
from library.training.plan import StepPlan

MAX_THREADS = 4
JPEG_QUALITY = 80
CUT_SHOWN, CUT_DOUBTFUL = 0.02, 0.2  # share of a picture that is cut off
ENLARGED_SHOWN, ENLARGED_DOUBTFUL = 1.05, 1.2  # times


@dataclass(frozen=True)
class Shown:
    """One picture as it is shown."""

    name: str
    size_wh: Size  # of the file, upright
    choice: BucketChoice
    num_repeats: int
    marks: tuple[str, ...]
    caption: str  # as its first step sees it
    seen: bytes  # JPEG of what its first step sees
    whole: bytes | None  # JPEG of the whole with the crop in it, where something is always cut off

    @property
    def facts(self) -> list[str]:
        """What is worth knowing of it."""
        facts = [f"{self.size_wh[0]}x{self.size_wh[1]}"]
        if self.num_repeats != 1:
            facts.append(counted(self.num_repeats, "repeat"))
        return [*facts, *self.marks, *self._changes(CUT_SHOWN, ENLARGED_SHOWN, CUT_DOUBTFUL, ENLARGED_DOUBTFUL)]

    @property
    def doubts(self) -> list[str]:
        """What training does to it that one may not want."""
        return self._changes(CUT_DOUBTFUL, ENLARGED_DOUBTFUL)

    def _changes(self, cut: float, enlarged: float, cut_below: float = 2, enlarged_below: float = inf) -> list[str]:
        """How much is cut off and by how much it is enlarged, where that lies within bounds."""
        share, factor = share_cut(self.choice), self.choice.resized_wh[0] / self.size_wh[0]
        changes = [f"{share:.0%} cut off"] if cut <= share < cut_below else []
        return changes + ([f"enlarged {factor:.1f} times"] if enlarged <= factor < enlarged_below else [])


@dataclass(frozen=True)
class Bucket:
    """The pictures that are trained at one size."""

    size_wh: Size
    dataset: int
    pictures: list[Shown]

    @property
    def num_repeats(self) -> int:
        return sum(picture.num_repeats for picture in self.pictures)


@dataclass(frozen=True)
class DatasetSheet:
    """A dataset as it is shown."""

    title: str
    buckets: list[Bucket]  # the fullest first
    audit: Audit
    tags: Counter[str]
    plan: StepPlan
    notes: list[str]  # on how the dataset is read
    damaged: list[str]
    num_datasets: int
    num_held_out: int

    def heading(self, bucket: Bucket) -> str:
        """What stands above a bucket's pictures."""
        dataset = f"dataset {bucket.dataset + 1}, " if self.num_datasets > 1 else ""
        repeats = f", {bucket.num_repeats} with repeats" if bucket.num_repeats != len(bucket.pictures) else ""
        size = f"{bucket.size_wh[0]}x{bucket.size_wh[1]}"
        return f"{dataset}{size}, {counted(len(bucket.pictures), 'picture')}{repeats}"


def look_at_dataset(options: TrainNetworkOptions, longest_side: int) -> DatasetSheet:
    """Read the dataset that the options describe, with thumbnails of at most `longest_side` pixels."""
    if options.dataset_class:
        raise UserError("--dataset_class: a dataset of your own has no pictures that could be shown")
    index, damaged = PictureIndex(), []
    try:
        scanned, decoded = read_dataset(options, index, damaged)
        scanned, validation = split_validation(scanned, options.seed, options.dataset_config)
        choices, repeats = choose_buckets_of(scanned), repeats_of(scanned)
        audit = audit_of(options, scanned, choices, decoded, index)
    finally:
        index.write()
    plan = plan_of(options, scanned, choices, repeats)
    views = Views(scanned, choices, plan.max_train_steps, options.fast_jpeg)
    draws = first_draws(scanned, choices, repeats, options.seed or 0, plan.accumulation)
    return DatasetSheet(
        title=options.output_name or "dataset",
        buckets=_buckets(views, draws, repeats, longest_side),
        audit=audit,
        tags=tags_of(scanned, AuditMemory()),
        plan=plan,
        notes=scanned.notes,
        damaged=damaged,
        num_datasets=len(scanned.specs),
        num_held_out=len(validation.records) if validation else 0,
    )


def first_draws(
    scanned: ScannedDataset, choices: Sequence[BucketChoice], repeats: Sequence[int], seed: int, accumulation: int
) -> list[Draw]:
    """Of every record the draw in which the first epoch has it first; one of its own where it has none."""
    first: dict[int, Draw] = {}
    for batch in sampler_of(scanned, choices, repeats, seed, accumulation):
        for draw in batch:
            first.setdefault(draw.index, draw)
    others = (Draw(index, derived_seed(seed, 1, index), 1, 0) for index in range(len(scanned.records)))
    return [first.get(draw.index, draw) for draw in others]


def share_cut(choice: BucketChoice) -> float:
    """How much of a picture is cut off for its bucket."""
    (width, height), (whole_width, whole_height) = choice.bucket_wh, choice.resized_wh
    return 1 - width * height / (whole_width * whole_height)


def panels_of(sheet: DatasetSheet) -> list[Panel]:
    """The buckets as panels of a PNG sheet."""
    return [Panel(sheet.heading(bucket), list(map(_tile, bucket.pictures))) for bucket in sheet.buckets]


def _tile(picture: Shown) -> Tile:
    lines = [Line(picture.name), Line(", ".join(picture.facts), GREY, 2)]
    if picture.doubts:
        lines.append(Line(", ".join(picture.doubts), ORANGE, 2))
    caption = Line(picture.caption, BLACK, MAX_CAPTION_LINES) if picture.caption else Line(NO_CAPTION, GREY)
    return Tile(Image.open(io.BytesIO(picture.seen)), (*lines, caption), "reg" in picture.marks)


def _buckets(views: Views, draws: list[Draw], repeats: Sequence[int], longest_side: int) -> list[Bucket]:
    num_threads = min(MAX_THREADS, os.cpu_count() or 1)
    grouped: dict[tuple[int, Size], list[Shown]] = defaultdict(list)
    with threads(num_threads) as pool:
        results = ahead(
            pool, lambda draw: _shown(views, draw, repeats[draw.index], longest_side), draws, 2 * num_threads
        )
        for draw, picture in zip(draws, tqdm(results, "drawing", len(draws), unit="pictures", delay=1), strict=True):
            grouped[views.subset(draw.index).dataset, picture.choice.bucket_wh].append(picture)
    buckets = [Bucket(size_wh, dataset, pictures) for (dataset, size_wh), pictures in grouped.items()]
    return sorted(buckets, key=lambda bucket: (bucket.dataset, -bucket.num_repeats, bucket.size_wh))


def _shown(views: Views, draw: Draw, num_repeats: int, longest_side: int) -> Shown:
    record, choice, subset = views.scanned.records[draw.index], views.choices[draw.index], views.subset(draw.index)
    view = views.view(draw, with_picture=not record.is_gone)
    marks = marks_of(view, record, subset)
    if record.is_gone:
        view = replace(view, pixels=np.full((*choice.bucket_wh[::-1], 3), BLANK, np.uint8))
    is_fixed = not (record.is_gone or subset.random_crop or subset.face_crop_aug_range)
    is_cut = is_fixed and share_cut(choice) >= CUT_SHOWN
    return Shown(
        name=f"{record.path.parent.name}/{record.path.name}",
        size_wh=record.size_wh,
        choice=choice,
        num_repeats=num_repeats,
        marks=marks,
        caption=view.caption,
        seen=_jpeg(thumbnail(view, longest_side)),
        whole=_jpeg(_whole(record.path, choice, longest_side)) if is_cut else None,
    )


def _whole(path: Path, choice: BucketChoice, longest_side: int) -> Image.Image:
    """The whole picture, small, with the crop in its middle framed."""
    with open_picture(path) as image:
        if image.format == "JPEG":
            image.draft("RGB", (longest_side, longest_side))  # decodes no more than is shown
            small = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        else:
            small = load_image(path)
    left_top = tuple((whole - side) // 2 for whole, side in zip(choice.resized_wh, choice.bucket_wh, strict=True))
    crop = Crop(choice.resized_wh, choice.resized_wh, left_top, choice.bucket_wh, CENTRE)
    return whole_with_crop(small, crop, longest_side)


def _jpeg(picture: Image.Image) -> bytes:
    data = io.BytesIO()
    picture.save(data, format="JPEG", quality=JPEG_QUALITY, optimize=True)
    return data.getvalue()
