"""`--dataset_config`: several datasets, each with its own size, batch size and folders, from a TOML or JSON file.

A value in a subset goes before one in its dataset, that before `[general]`, and that before the flag of its name.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.dataset.captions import takes_tags_apart
from library.dataset.config import INTERPOLATIONS, SPEC_FLAGS, SUBSET_FLAGS, DatasetSpec, SubsetOptions
from library.dataset.dataset_config_keys import (
    ATTRIBUTES,
    KEYS,
    Table,
    check_document,
    fits,
    structure_problems,
    tables_of,
)
from library.errors import UserError
from library.files import read_user_text
from library.options.checks import caption_numbers
from library.options.config_file import KEY_LINE, parse_json, parse_toml
from library.options.derived import caches_latents, caption_extension, face_crop_range

WITHOUT_EFFECT = ("network_multiplier",)
TABLE_LINE = re.compile(r"\s*\[+([\w.\s]+)\]+\s*(?:#.*)?$")
FLAG_OF_KEY = {"batch_size": "train_batch_size", "num_repeats": "dataset_repeats"}


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
    text, document = _parse(path)
    problems, missing, notes = check_document(document), [], []
    if not structure_problems(document):
        missing = _missing(path, text, document)
    if not problems:
        specs, subsets, names = [], [], []
        for index, (place, subset_places) in enumerate(_places(document)):
            specs.append(_spec(place, options))
            subsets += [_subset(p, options, index) for p in subset_places]
            names += [p.name for p in subset_places]
            problems += _spec_problems(specs[-1], place)
        problems += _subset_problems(specs, dict(zip(names, subsets, strict=True)), options)
    if problems or missing:
        lines = _lines_of_keys(text)
        raise UserError(*(f"{_where(path, problem, lines)}: {problem}" for problem in problems), *missing)
    for flag in ("train_data_dir", "reg_data_dir", "in_json", "conditioning_data_dir"):
        if getattr(options, flag):
            notes.append(f"--{flag} has no effect beside --dataset_config")
    tables = [table for _, table, _ in tables_of(document)]
    notes += [f"{path}: {key} has no effect" for key in WITHOUT_EFFECT if any(key in table for table in tables)]
    attributes = {name for table in tables for name in table.get("custom_attributes", {})}
    notes += [f"{path}: custom_attributes: {name} has no effect" for name in sorted(attributes - set(ATTRIBUTES))]
    return specs, subsets, notes


def _parse(path: Path) -> tuple[str, Table]:
    if path.suffix.lower() not in (".toml", ".json"):
        raise UserError(f"--dataset_config must be a .toml or .json file, got {path}")
    text = read_user_text(path, f"--dataset_config: {path}")
    return text, (parse_toml if path.suffix.lower() == ".toml" else parse_json)(path, text)


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
    shared = {name: place.value(name, options) for name in SPEC_FLAGS}
    resolution = shared["resolution"]
    if resolution is not None:
        sides = resolution if isinstance(resolution, list) else [resolution]
        shared["resolution"] = ",".join(str(side) for side in sides)
    return DatasetSpec(batch_size=place.value("batch_size", options), **shared)


def _spec_problems(spec: DatasetSpec, place: Place) -> list[str]:
    return [f"{place.name}: {problem}" for problem in spec.problems()]


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


def _subset_problems(specs: list[DatasetSpec], subsets: dict[str, SubsetOptions], options: Any) -> list[str]:
    problems, seen = [], set()
    for name, subset in subsets.items():
        where = f"{name}: {'metadata_file' if subset.metadata_file else 'image_dir'} {subset.source}"
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
        problems += [f"{where}: {problem}" for problem in _caption_problems(subset)]
        problems += [f"{where}: {problem}" for problem in _crop_problems(subset, specs[subset.dataset], options)]
    return problems


def _missing(path: Path, text: str, document: Table) -> list[str]:
    """A sentence for each folder and file that is not there, once, with the first line that has its name."""
    missing = {}
    for table in (table for _, table, level in tables_of(document) if level == "s"):
        for key, kind in (("image_dir", "folder"), ("conditioning_data_dir", "folder"), ("metadata_file", "file")):
            given = table.get(key)
            place = Path(given) if given and fits(KEYS[key].kind, given) else None
            if place and not (place.is_dir() if kind == "folder" else place.is_file()):
                missing[key, place] = kind
    lines = text.splitlines()
    sentences = []
    for (key, place), kind in missing.items():
        line = next((n for n, line in enumerate(lines, start=1) if key in line and place.name in line), None)
        where = f"{path}:{line}" if line else str(path)
        sentences.append(f"{where}: {key}: there is no {kind} {place}")
    return sentences


def _lines_of_keys(text: str) -> dict[str, int]:
    """The lines, from 1, of the tables and keys of a TOML file, by what their problems begin with; JSON has none."""
    lines, table, dataset, subset = {}, "", -1, -1
    for number, line in enumerate(text.split("\n"), start=1):
        if header := TABLE_LINE.match(line):
            table = "".join(header[1].split())
            if table == "datasets":
                dataset, subset = dataset + 1, -1
                table = f"datasets[{dataset}]"
            elif table == "datasets.subsets":
                subset += 1
                table = f"datasets[{dataset}].subsets[{subset}]"
            lines.setdefault(table, number)
        elif key := KEY_LINE.match(line):
            lines[f"{table}: {key[2]}" if table else key[2]] = number
    return lines


def _where(path: Path, problem: str, lines: dict[str, int]) -> str:
    """The file with the line of the key that a problem begins with, else with that of its table."""
    beginning = re.match(r"(\S+: )?\S*", problem)[0]
    line = lines.get(beginning) or lines.get(re.split(r"[: ]", beginning)[0])
    return f"{path}:{line}" if line else str(path)


def _caption_problems(subset: SubsetOptions) -> list[str]:
    problems = [problem.removeprefix("--") for problem in caption_numbers(subset)]
    if not subset.caption_separator and takes_tags_apart(subset):
        problems.append("caption_separator is empty, so that there are no tags to shuffle, drop or warm up with")
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
