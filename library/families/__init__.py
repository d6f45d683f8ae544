"""Model families by name, and which checkpoints each of them trains. Needs no torch."""

import importlib
from dataclasses import dataclass
from typing import Any

from library.errors import UserError
from library.families.detect import KINDS, CheckpointInfo


@dataclass(frozen=True)
class FamilyRow:
    """Where a family's class is, and the kinds of checkpoint it takes."""

    path: str  # "module:Class", imported only when chosen
    kinds: tuple[str, ...]  # keys of library.families.detect.KINDS
    bucket_step: int  # pixels; what the sides of buckets must be divisible by
    text_files: bool  # whether the outputs of its text encoders have files beside the pictures, as kohya's do


FAMILIES = {
    "sd": FamilyRow("library.families.sd:Sd", ("sd1", "sd2"), 64, text_files=False),
    "sdxl": FamilyRow("library.families.sdxl:Sdxl", ("sdxl",), 32, text_files=True),
}


def family_of_kind(checkpoint: CheckpointInfo, wanted: str | None = None) -> str:
    """The name of the family that trains this checkpoint; UserError where there is none, or another is wanted."""
    rows = {name: row for name, row in FAMILIES.items() if wanted in (None, name)}
    for name, row in rows.items():
        if checkpoint.kind in row.kinds:
            return name
    trained = " or a ".join(KINDS[kind] for row in rows.values() for kind in row.kinds)
    who = "this version" if wanted is None else "this script"
    others = any(checkpoint.kind in row.kinds for row in FAMILIES.values())
    raise UserError(
        f"--pretrained_model_name_or_path: {checkpoint.path} is a {checkpoint.description}; {who} trains a {trained}"
        + ("; use train_network.py" if others else "")
    )


def writes_text(options: Any, family: str) -> bool:
    """Whether text encoder outputs are kept in files."""
    return options.cache_text_encoder_outputs_to_disk and FAMILIES[family].text_files


def family_class(name: str) -> type:
    module_name, _, class_name = FAMILIES[name].path.partition(":")
    return getattr(importlib.import_module(module_name), class_name)
