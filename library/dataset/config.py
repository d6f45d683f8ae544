"""What describes a dataset: its sizes and batches, and its subsets, which say what is read from where."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.options.derived import MAX_SIDE, resolution_wh

Size = tuple[int, int]  # width and height in pixels

PICTURE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".jxl")

INTERPOLATIONS = ("lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "box")

# Fields of DatasetSpec that are flags of the same name.
SPEC_FLAGS = (
    "resolution",
    "enable_bucket",
    "min_bucket_reso",
    "max_bucket_reso",
    "bucket_reso_steps",
    "bucket_no_upscale",
    "resize_interpolation",
    "validation_split",
    "validation_seed",
)

# Fields of SubsetOptions that are flags of the same name.
SUBSET_FLAGS = (
    "shuffle_caption",
    "caption_separator",
    "keep_tokens",
    "keep_tokens_separator",
    "secondary_separator",
    "enable_wildcard",
    "caption_prefix",
    "caption_suffix",
    "token_warmup_min",
    "token_warmup_step",
    "color_aug",
    "flip_aug",
    "random_crop",
    "alpha_mask",
    "cache_info",
    "resize_interpolation",
    "caption_dropout_rate",
    "caption_dropout_every_n_epochs",
    "caption_tag_dropout_rate",
)


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """How the pictures of one dataset are sized and batched; its names are those of the flags."""

    resolution: str | None  # "width,height" in pixels
    batch_size: int
    enable_bucket: bool
    min_bucket_reso: int
    max_bucket_reso: int
    bucket_reso_steps: int
    bucket_no_upscale: bool
    resize_interpolation: str | None
    validation_split: float = 0.0  # share of the pictures that is held out
    validation_seed: int | None = None  # of the choice of these

    def problems(self) -> list[str]:
        """What cannot work, a sentence each, without the place where it was given."""
        if self.resolution is None:
            return ["there is no resolution, neither here nor as --resolution"]
        problems = bucket_range_problems(self) if self.enable_bucket else []
        if self.batch_size < 1:
            problems.append(f"batch_size must be at least 1, got {self.batch_size}")
        if self.resize_interpolation not in (None, *INTERPOLATIONS):
            known = ", ".join(INTERPOLATIONS)
            problems.append(f"resize_interpolation must be one of {known}, got {self.resize_interpolation!r}")
        if not 0 <= self.validation_split <= 1:
            problems.append(f"validation_split must be a share from 0 to 1, got {self.validation_split}")
        return problems


@dataclass(frozen=True, kw_only=True)
class SubsetOptions:
    """One folder of pictures, or a file that names some, and how its pictures and captions are used."""

    image_dir: Path | None  # None only beside a metadata file whose keys are absolute paths
    metadata_file: Path | None = None  # names the pictures, with their captions
    dataset: int = 0  # index into ScannedDataset.specs
    num_repeats: int = 1
    class_tokens: str | None = None  # caption of pictures that have none
    is_reg: bool = False
    caption_extension: str = ".caption"
    shuffle_caption: bool = False
    caption_separator: str = ","
    keep_tokens: int = 0
    keep_tokens_separator: str = ""
    secondary_separator: str | None = None
    enable_wildcard: bool = False
    caption_prefix: str | None = None
    caption_suffix: str | None = None
    token_warmup_min: int = 1
    token_warmup_step: float = 0  # steps, or below 1 a share of all steps
    color_aug: bool = False
    flip_aug: bool = False
    random_crop: bool = False
    face_crop_aug_range: tuple[float, float] | None = None  # shorter side of the crop, in sizes of the face
    resize_interpolation: str | None = None
    cache_info: bool = False  # keep captions and sizes in a file in the folder
    alpha_mask: bool = False  # weigh the loss by the picture's transparency
    conditioning_data_dir: Path | None = None  # masks of the same names, whose red channel weighs the loss
    diff_output_preservation: bool = False  # the target is what the model without the network predicts
    caption_dropout_rate: float = 0.0
    caption_dropout_every_n_epochs: int = 0
    caption_tag_dropout_rate: float = 0.0

    @property
    def source(self) -> Path:
        """What its pictures are listed by: the metadata file, else the folder."""
        return self.metadata_file or self.image_dir


def spec_from_flags(options: Any) -> DatasetSpec:
    """The one dataset that the flags describe."""
    shared = {name: getattr(options, name) for name in SPEC_FLAGS}
    return DatasetSpec(batch_size=options.train_batch_size, **shared)


def bucket_range_problems(spec: DatasetSpec) -> list[str]:
    """Whether the resolution lies between the smallest and the largest side of a bucket."""
    step = spec.bucket_reso_steps
    if min(step, spec.min_bucket_reso) < 1 or spec.min_bucket_reso > spec.max_bucket_reso:
        return ["min_bucket_reso, max_bucket_reso and bucket_reso_steps must be above 0, and min not above max"]
    if spec.max_bucket_reso > MAX_SIDE:
        return [f"max_bucket_reso must be at most {MAX_SIDE}, got {spec.max_bucket_reso}"]
    sides = resolution_wh(spec)
    lowest = max(spec.min_bucket_reso // step, 1) * step
    highest = -(-spec.max_bucket_reso // step) * step
    if min(sides) < lowest or max(sides) > highest:
        return [f"resolution {spec.resolution} must lie between min_bucket_reso {lowest} and max_bucket_reso {highest}"]
    return []


def is_file(entry: os.DirEntry) -> bool:
    """Whether something in a folder is a file or a link to one; a pipe, or links in a circle, are none."""
    try:
        return entry.is_file()
    except OSError:
        return False


def is_picture_name(name: str) -> bool:
    """Whether a file of this name is taken for a picture; hidden files, such as macOS's ._x.png, are not."""
    return not name.startswith(".") and name.lower().endswith(PICTURE_EXTENSIONS)
