"""The keys of a `--dataset_config` file: what each takes, where it may stand, and what is wrong with a file's."""

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from library.options.convert import A_PATH, MAX_WHOLE, is_path
from library.options.derived import MAX_SIDE

BOOL, INT, NUMBER, TEXT, PAIR = "true or false", "a whole number", "a number", "text in quotes", "a list of two numbers"
SIZE = f"a side of at most {MAX_SIDE} pixels, or a list of width and height"
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
    "image_dir": Key(A_PATH, "s"),
    "is_reg": Key(BOOL, "s"),
    "metadata_file": Key(A_PATH, "s"),
    "conditioning_data_dir": Key(A_PATH, "s"),
}
ATTRIBUTES = ("diff_output_preservation",)  # keys of custom_attributes that mean something
NOT_WITH_METADATA_FILE = ("caption_extension", "class_tokens", "cache_info", "is_reg", "conditioning_data_dir")
LEVEL_NAMES = {"g": "[general]", "d": "[[datasets]]", "s": "[[datasets.subsets]]"}

Table = dict[str, Any]


def check_document(document: Table) -> list[str]:
    """What is wrong with the tables and keys of a file, with the place of each mistake."""
    if problems := structure_problems(document):
        return problems
    problems = [problem for name, table, level in tables_of(document) for problem in _check_table(name, table, level)]
    return problems + [
        problem for index, dataset in enumerate(document["datasets"]) for problem in _check_style(index, dataset)
    ]


def structure_problems(document: Table) -> list[str]:
    """What is wrong with the tables alone; where nothing is, `tables_of` finds all of them."""
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
    return problems


def _is_list_of_tables(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def tables_of(document: Table) -> Iterator[tuple[str, Table, str]]:
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
        elif not fits(known.kind, value):
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
        return [
            f"{name}.subsets[{s}] has no image_dir: the folder of its pictures"
            for s, subset in enumerate(subsets)
            if not subset.get("image_dir")
        ]
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


def fits(kind: str, value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MAX_WHOLE
    is_int = is_number and isinstance(value, int)
    is_pair = isinstance(value, list) and len(value) == 2
    return {
        BOOL: isinstance(value, bool),
        INT: is_int,
        NUMBER: is_number,
        TEXT: isinstance(value, str),
        A_PATH: isinstance(value, str) and is_path(value),
        TABLE: isinstance(value, dict),
        PAIR: is_pair and all(fits(NUMBER, item) for item in value),
        SIZE: all(type(side) is int and 0 < side <= MAX_SIDE for side in (value if is_pair else [value])),
    }[kind]
