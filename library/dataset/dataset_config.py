"""`--dataset_config`: several datasets, each with its own size, batch size and folders, from a TOML or JSON file.

A value in a subset goes before one in its dataset, that before `[general]`, and that before the flag of its name.
"""

import difflib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import toml

from library.dataset.config import INTERPOLATIONS, SUBSET_FLAGS, DatasetSpec, SubsetOptions
from library.errors import UserError
from library.options.derived import caches_latents, caption_extension, face_crop_range

BOOL, INT, NUMBER, TEXT, PAIR = "true or false", "a whole number", "a number", "text in quotes", "a list of two numbers"
SIZE = "a side in pixels, or a list of width and height"
TABLE = "a table"


@dataclass(frozen=True)
class Key:
    """What a key of the file takes, and in which tables it may stand."""

    kind: str
    levels: str = "gds"  # [general], [[datasets]], [[datasets.subsets]]


KEYS: dict[str, Key] = {
    "batch_size": Key(INT, "gd"),
    "resolution": Key(SIZE, "gd"),
    "network_multiplier": Key(NUMBER, "gd"),
    "enable_bucket": Key(BOOL, "gd"),
    "min_bucket_reso": Key(INT, "gd"),
    "max_bucket_reso": Key(INT, "gd"),
    "bucket_reso_steps": Key(INT, "gd"),
    "bucket_no_upscale": Key(BOOL, "gd"),
    "validation_split": Key(NUMBER, "gd"),
    "validation_seed": Key(INT, "gd"),
    "resize_interpolation": Key(TEXT),
    "num_repeats": Key(INT),
    "shuffle_caption": Key(BOOL),
    "caption_separator": Key(TEXT),
    "keep_tokens": Key(INT),
    "keep_tokens_separator": Key(TEXT),
    "secondary_separator": Key(TEXT),
    "enable_wildcard": Key(BOOL),
    "caption_prefix": Key(TEXT),
    "caption_suffix": Key(TEXT),
    "token_warmup_min": Key(INT),
    "token_warmup_step": Key(NUMBER),
    "color_aug": Key(BOOL),
    "flip_aug": Key(BOOL),
    "random_crop": Key(BOOL),
    "face_crop_aug_range": Key(PAIR),
    "custom_attributes": Key(TABLE),
    "caption_dropout_rate": Key(NUMBER),
    "caption_dropout_every_n_epochs": Key(INT),
    "caption_tag_dropout_rate": Key(NUMBER),
    "caption_extension": Key(TEXT),
    "class_tokens": Key(TEXT),
    "cache_info": Key(BOOL),
    "alpha_mask": Key(BOOL, "s"),
    "image_dir": Key(TEXT, "s"),
    "is_reg": Key(BOOL, "s"),
    "metadata_file": Key(TEXT, "s"),
    "conditioning_data_dir": Key(TEXT, "s"),
}
ATTRIBUTES = ("diff_output_preservation",)  # keys of custom_attributes that mean something
WITHOUT_EFFECT = ("network_multiplier",)
NOT_WITH_METADATA_FILE = ("caption_extension", "class_tokens", "cache_info", "is_reg", "conditioning_data_dir")
FLAG_OF_KEY = {"batch_size": "train_batch_size", "num_repeats": "dataset_repeats"}
LEVEL_NAMES = {"g": "[general]", "d": "[[datasets]]", "s": "[[datasets.subsets]]"}

Table = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """A table of the file with what stands above it, nearest first."""

    name: str  # "datasets[0].subsets[1]", for messages
    tables: tuple[Table, ...]

    def value(self, key: str, options: Any, default: Any = None) -> Any:
        """The key's value here or above, else that of the flag of its name."""
        for table in self.tables:
            if table.get(key) is not None:
                return table[key]
        return getattr(options, FLAG_OF_KEY.get(key, key), default)


def read_dataset_config(options: Any) -> tuple[list[DatasetSpec], list[SubsetOptions], list[str]]:
    """The datasets, the subsets of all of them, and notes; a UserError names every mistake with its place."""
    path = Path(options.dataset_config)
    document = _parse(path)
    problems, notes = _check_document(document), []
    if not problems:
        specs, subsets = [], []
        for index, (place, subset_places) in enumerate(_places(document)):
            specs.append(_spec(place, options))
            subsets += [_subset(p, options, index) for p in subset_places]
            problems += _spec_problems(specs[-1], place, options)
        problems += _subset_problems(specs, subsets, options)
    if problems:
        raise UserError(*(f"{path}: {problem}" for problem in problems))
    for flag in ("train_data_dir", "reg_data_dir", "in_json"):
        if getattr(options, flag):
            notes.append(f"--{flag} has no effect beside --dataset_config")
    tables = [table for _, table, _ in _tables(document)]
    notes += [f"{path}: {key} has no effect" for key in WITHOUT_EFFECT if any(key in table for table in tables)]
    attributes = {name for table in tables for name in table.get("custom_attributes", {})}
    notes += [f"{path}: custom_attributes: {name} has no effect" for name in sorted(attributes - set(ATTRIBUTES))]
    return specs, subsets, notes


def _parse(path: Path) -> Table:
    if path.suffix.lower() not in (".toml", ".json"):
        raise UserError(f"--dataset_config must be a .toml or .json file, got {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"--dataset_config: {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--dataset_config: {path} is not in UTF-8; save it with this encoding") from error
    try:
        document = toml.loads(text) if path.suffix.lower() == ".toml" else json.loads(text)
    except (toml.TomlDecodeError, json.JSONDecodeError, IndexError) as error:
        raise UserError(f"--dataset_config: {path} cannot be read: {error}") from error
    if not isinstance(document, dict):
        raise UserError(f"--dataset_config: {path} must hold [general] and [[datasets]]")
    return document


def _check_document(document: Table) -> list[str]:
    problems = [
        f"{name} is not known at the top; there are [general] and [[datasets]]"
        for name in document
        if name not in ("general", "datasets")
    ]
    if not isinstance(document.get("general", {}), dict):
        return [*problems, "general must be one table, [general]"]
    datasets = document.get("datasets")
    if not _is_list_of_tables(datasets):
        return [*problems, "there are no datasets; write [[datasets]] and, in each, [[datasets.subsets]]"]
    for index, dataset in enumerate(datasets):
        if not _is_list_of_tables(dataset.get("subsets")):
            problems.append(f"datasets[{index}] has no subsets; write [[datasets.subsets]] with an image_dir")
    if problems:
        return problems
    problems = [problem for name, table, level in _tables(document) for problem in _check_table(name, table, level)]
    return problems + [problem for index, dataset in enumerate(datasets) for problem in _check_style(index, dataset)]


def _is_list_of_tables(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _tables(document: Table) -> Iterator[tuple[str, Table, str]]:
    """Every table with its name and level."""
    yield "general", document.get("general", {}), "g"
    for d, dataset in enumerate(document["datasets"]):
        yield f"datasets[{d}]", {key: value for key, value in dataset.items() if key != "subsets"}, "d"
        for s, subset in enumerate(dataset["subsets"]):
            yield f"datasets[{d}].subsets[{s}]", subset, "s"


def _check_table(name: str, table: Table, level: str) -> list[str]:
    problems = []
    for key, value in table.items():
        known = KEYS.get(key)
        if known is None:
            near = difflib.get_close_matches(key, KEYS, 1)
            problems.append(f"{name}: {key} is not a key{f'; did you mean {near[0]}?' if near else ''}")
        elif level not in known.levels:
            places = " and ".join(LEVEL_NAMES[letter] for letter in known.levels)
            problems.append(f"{name}: {key} cannot stand here, only in {places}")
        elif not _fits(known.kind, value):
            problems.append(f"{name}: {key} must be {known.kind}, got {value!r}")
        elif key == "custom_attributes":
            problems += [
                f"{name}.{key}: {attribute} must be {BOOL}, got {value[attribute]!r}"
                for attribute in ATTRIBUTES
                if not isinstance(value.get(attribute, False), bool)
            ]
    return problems


def _check_style(index: int, dataset: Table) -> list[str]:
    """Whether the subsets of a dataset are all folders with captions, or all metadata files, and have keys of these."""
    name, subsets = f"datasets[{index}]", dataset["subsets"]
    num_files = sum(bool(subset.get("metadata_file")) for subset in subsets)
    if num_files == 0:
        return []
    if num_files < len(subsets):
        return [
            f"{name}: {num_files} of {len(subsets)} subsets have a metadata_file; "
            "the others need a [[datasets]] of their own"
        ]
    tables = {name: dataset} | {f"{name}.subsets[{s}]": subset for s, subset in enumerate(subsets)}
    return [
        f"{place}: {key} does not go with metadata_file, which names pictures and captions"
        for place, table in tables.items()
        for key in NOT_WITH_METADATA_FILE
        if key in table
    ]


def _fits(kind: str, value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    is_int = is_number and isinstance(value, int)
    is_pair = isinstance(value, list) and len(value) == 2
    return {
        BOOL: isinstance(value, bool),
        INT: is_int,
        NUMBER: is_number,
        TEXT: isinstance(value, str),
        TABLE: isinstance(value, dict),
        PAIR: is_pair and all(_fits(NUMBER, item) for item in value),
        SIZE: (is_int and value > 0) or (is_pair and all(_fits(INT, item) and item > 0 for item in value)),
    }[kind]


def _places(document: Table) -> Iterator[tuple[Place, list[Place]]]:
    """Every dataset with its subsets."""
    general = document.get("general", {})
    for d, dataset in enumerate(document["datasets"]):
        above = (dataset, general)
        subsets = [
            Place(f"datasets[{d}].subsets[{s}]", (subset, *above)) for s, subset in enumerate(dataset["subsets"])
        ]
        yield Place(f"datasets[{d}]", above), subsets


def _spec(place: Place, options: Any) -> DatasetSpec:
    resolution = place.value("resolution", options)
    if isinstance(resolution, list):
        resolution = ",".join(str(side) for side in resolution)
    return DatasetSpec(
        resolution=None if resolution is None else str(resolution),
        batch_size=place.value("batch_size", options),
        **{
            name: place.value(name, options)
            for name in ("enable_bucket", "min_bucket_reso", "max_bucket_reso", "bucket_reso_steps")
        },
        bucket_no_upscale=place.value("bucket_no_upscale", options),
        resize_interpolation=place.value("resize_interpolation", options),
        validation_split=place.value("validation_split", options),
        validation_seed=place.value("validation_seed", options),
    )


def _spec_problems(spec: DatasetSpec, place: Place, options: Any) -> list[str]:
    problems, step = spec.problems(), spec.bucket_reso_steps
    if spec.enable_bucket and step % options.bucket_step_divisor:
        problems.append(f"bucket_reso_steps must be a multiple of {options.bucket_step_divisor}, got {step}")
    return [f"{place.name}: {problem}" for problem in problems]


def _subset(place: Place, options: Any, dataset: int) -> SubsetOptions:
    own = place.tables[0]
    metadata_file = own.get("metadata_file")
    face_range = place.value("face_crop_aug_range", None)
    shared = {name: place.value(name, options) for name in SUBSET_FLAGS}
    extension = place.value("caption_extension", None)
    if extension is None:
        extension = caption_extension(options)
    return SubsetOptions(
        image_dir=Path(own["image_dir"]) if own.get("image_dir") else None,
        metadata_file=Path(metadata_file) if metadata_file else None,
        num_repeats=place.value("num_repeats", options),
        face_crop_aug_range=face_crop_range(options) if face_range is None else tuple(face_range),
        class_tokens=None if metadata_file else place.value("class_tokens", None),
        is_reg=own.get("is_reg", False),
        conditioning_data_dir=Path(own["conditioning_data_dir"]) if own.get("conditioning_data_dir") else None,
        caption_extension=extension if extension.startswith(".") else f".{extension}",
        dataset=dataset,
        **{name: place.value("custom_attributes", None, {}).get(name, False) for name in ATTRIBUTES},
        **(shared | {"cache_info": shared["cache_info"] and not metadata_file}),
    )


def _subset_problems(specs: list[DatasetSpec], subsets: list[SubsetOptions], options: Any) -> list[str]:
    problems, seen = [], set()
    for subset in subsets:
        where = f"metadata_file {subset.source}" if subset.metadata_file else f"image_dir {subset.source}"
        if subset.source is None:
            problems.append("a subset has no image_dir: the folder of its pictures")
        elif subset.image_dir and not subset.image_dir.is_dir():
            problems.append(f"image_dir {subset.image_dir} is not a folder")
        if (subset.dataset, subset.source) in seen:
            problems.append(f"{where} stands twice in one dataset")
        seen.add((subset.dataset, subset.source))
        if subset.conditioning_data_dir and not options.masked_loss:
            problems.append(f"{where}: conditioning_data_dir needs --masked_loss")
        if subset.num_repeats < 1:
            problems.append(f"{where}: num_repeats must be at least 1, got {subset.num_repeats}")
        if subset.resize_interpolation not in (None, *INTERPOLATIONS):
            known = ", ".join(INTERPOLATIONS)
            problems.append(
                f"{where}: resize_interpolation must be one of {known}, got {subset.resize_interpolation!r}"
            )
        problems += [f"{where}: {problem}" for problem in _crop_problems(subset, specs[subset.dataset], options)]
    return problems


def _crop_problems(subset: SubsetOptions, spec: DatasetSpec, options: Any) -> list[str]:
    problems, face_range = [], subset.face_crop_aug_range
    if face_range and not 0 < face_range[0] <= face_range[1]:
        problems.append(f"face_crop_aug_range must be two numbers above 0, the smaller first, got {list(face_range)}")
    if caches_latents(options) and (subset.color_aug or subset.random_crop):
        problems.append("cached latents do not go with color_aug or random_crop")
    if caches_latents(options) and face_range and not spec.enable_bucket:
        problems.append("cached latents do not go with face_crop_aug_range")
    return problems
