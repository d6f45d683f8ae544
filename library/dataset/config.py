"""From flags and folders to subsets: what is read from where, and how often."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from library.errors import UserError, quoted_list
from library.options.derived import caption_extension, face_crop_range, resolution_wh

Size = tuple[int, int]  # width and height in pixels

PICTURE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".jxl")

INTERPOLATIONS = ("lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "box")

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
    return DatasetSpec(
        resolution=options.resolution,
        batch_size=options.train_batch_size,
        enable_bucket=options.enable_bucket,
        min_bucket_reso=options.min_bucket_reso,
        max_bucket_reso=options.max_bucket_reso,
        bucket_reso_steps=options.bucket_reso_steps,
        bucket_no_upscale=options.bucket_no_upscale,
        resize_interpolation=options.resize_interpolation,
        validation_split=options.validation_split,
        validation_seed=options.validation_seed,
    )


def bucket_range_problems(spec: DatasetSpec) -> list[str]:
    """Whether the resolution lies between the smallest and the largest side of a bucket."""
    step = spec.bucket_reso_steps
    if min(step, spec.min_bucket_reso) < 1 or spec.min_bucket_reso > spec.max_bucket_reso:
        return ["min_bucket_reso, max_bucket_reso and bucket_reso_steps must be above 0, and min not above max"]
    sides = resolution_wh(spec)
    lowest = max(spec.min_bucket_reso // step, 1) * step
    highest = -(-spec.max_bucket_reso // step) * step
    if min(sides) < lowest or max(sides) > highest:
        return [f"resolution {spec.resolution} must lie between min_bucket_reso {lowest} and max_bucket_reso {highest}"]
    return []


@dataclass(frozen=True)
class RepeatFolder:
    """A folder named <repeats>_<name>."""

    path: Path
    num_repeats: int
    class_tokens: str


@dataclass
class FolderListing:
    """What the sub-folders of a data folder say: pictures to take, mistakes, and things worth knowing."""

    folders: list[RepeatFolder] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def parse_repeat_folder(name: str) -> tuple[int, str] | None:
    """Repeats and class tokens of a folder name such as "10_yabin"; None where it does not begin with a number."""
    first, *rest = name.split("_")
    try:
        return int(first), "_".join(rest)
    except ValueError:
        return None


def subsets_from_folders(options: Any) -> list[SubsetOptions]:
    """The subsets of --train_data_dir and --reg_data_dir; mistakes in both are raised together."""
    train, reg = _listings(options)
    problems = train.problems + reg.problems
    if options.reg_data_dir and not problems and os.path.samefile(options.train_data_dir, options.reg_data_dir):
        problems.append(f"--reg_data_dir is the same folder as --train_data_dir: {options.reg_data_dir}")
    if problems:
        raise UserError(*problems)
    shared = {name: getattr(options, name) for name in SUBSET_FLAGS}
    masks = Path(options.conditioning_data_dir) if options.masked_loss and options.conditioning_data_dir else None
    return [
        SubsetOptions(
            image_dir=folder.path,
            num_repeats=folder.num_repeats,
            class_tokens=folder.class_tokens,
            is_reg=listing is reg,
            caption_extension=caption_extension(options),
            conditioning_data_dir=masks if listing is train else None,
            face_crop_aug_range=face_crop_range(options),
            **shared,
        )
        for listing in (train, reg)
        for folder in listing.folders
    ]


def folder_notes(options: Any) -> list[str]:
    """What in --train_data_dir and --reg_data_dir is left out, one sentence each."""
    train, reg = _listings(options)
    return train.notes + reg.notes


def list_repeat_folders(flag: str, data_dir: str | Path | None) -> FolderListing:
    """The <repeats>_<name> folders directly in data_dir, sorted by name."""
    if not data_dir:
        return FolderListing(problems=[f"{flag} is missing: give the folder that holds folders such as 10_yabin"])
    root = Path(data_dir)
    if root.is_file():
        return FolderListing(problems=[f"{flag} must be a folder, but {root} is a file"])
    if not root.is_dir():
        return FolderListing(problems=[f"{flag}: there is no folder {root}"])
    try:
        return _classify(flag, root)
    except PermissionError as error:
        return FolderListing(problems=[f"{flag}: no permission to read {error.filename or root}"])


def _listings(options: Any) -> tuple[FolderListing, FolderListing]:
    train = list_repeat_folders("--train_data_dir", options.train_data_dir)
    reg = list_repeat_folders("--reg_data_dir", options.reg_data_dir) if options.reg_data_dir else FolderListing()
    return train, reg


def _classify(flag: str, root: Path) -> FolderListing:
    listing = FolderListing()
    unnumbered: list[Path] = []
    for folder in _sub_folders(root):
        parsed = parse_repeat_folder(folder.name)
        if parsed is None:
            unnumbered.append(folder)
        elif parsed[0] < 1:
            listing.notes.append(f"{folder} is left out: its number of repeats, {parsed[0]}, is below 1")
        else:
            listing.folders.append(RepeatFolder(folder, *parsed))
    if listing.folders:
        listing.notes += _left_out(root, unnumbered)
    else:
        listing.problems.append(f"{flag}: {_why_nothing_found(root, unnumbered, listing.notes)}")
    return listing


def _left_out(root: Path, unnumbered: list[Path]) -> list[str]:
    notes = [
        f"{folder} is left out: its name does not begin with a number of repeats, as 10_{folder.name} would"
        for folder in unnumbered
    ]
    if num_pictures := _num_pictures(root):
        notes.append(f"pictures directly in {root} ({num_pictures}) are left out: only those in its folders count")
    return notes


def _why_nothing_found(root: Path, unnumbered: list[Path], notes: list[str]) -> str:
    """The most likely mistake behind a data folder without any <repeats>_<name> folder, and what would be right."""
    if _num_pictures(root):
        if parse_repeat_folder(root.resolve().name):
            return f"{root} is itself a folder of pictures; use its parent {root.resolve().parent}"
        return (
            f"the pictures lie directly in {root}; move them to a folder in it whose name begins with the number "
            f"of repeats, such as {root / f'10_{root.resolve().name}'}"
        )
    if deeper := [folder for folder in unnumbered if _has_repeat_folders(folder)]:
        return f"{root} has no folders such as 10_yabin, but {deeper[0]} has: did you mean {deeper[0]}?"
    if with_pictures := [folder for folder in unnumbered if _num_pictures(folder)]:
        first = with_pictures[0]
        return (
            f"no folder in {root} begins with a number of repeats; "
            f"rename {quoted_list([folder.name for folder in with_pictures])} to e.g. 10_{first.name}"
        )
    if notes:
        return "; ".join(notes)
    if unnumbered:
        return f"there are no pictures in {root}, only the folders {quoted_list([f.name for f in unnumbered])}"
    return f"{root} is empty; it should hold folders of pictures such as 10_yabin"


def _sub_folders(root: Path) -> list[Path]:
    with os.scandir(root) as entries:
        names = [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    return [root / name for name in sorted(names)]


def _has_repeat_folders(root: Path) -> bool:
    parsed = [(parse_repeat_folder(folder.name), folder) for folder in _sub_folders(root)]
    return any(pair and pair[0] >= 1 and _num_pictures(folder) for pair, folder in parsed)


def _num_pictures(root: Path) -> int:
    with os.scandir(root) as entries:
        return sum(is_picture_name(entry.name) and entry.is_file() for entry in entries)


def is_picture_name(name: str) -> bool:
    """Whether a file of this name is taken for a picture; hidden files, such as macOS's ._x.png, are not."""
    return not name.startswith(".") and name.lower().endswith(PICTURE_EXTENSIONS)
