"""Model families by name, and which checkpoints each of them trains. Needs no torch."""

import importlib
from dataclasses import dataclass

from library.errors import UserError
from library.families.detect import KINDS, CheckpointInfo


@dataclass(frozen=True)
class FamilyRow:
    """Where a family's class is, and the kinds of checkpoint it takes."""

    path: str  # "module:Class", imported only when chosen
    kinds: tuple[str, ...]  # keys of library.families.detect.KINDS


FAMILIES = {"sd": FamilyRow("library.families.sd:Sd", ("sd1", "sd2"))}


def family_of_kind(checkpoint: CheckpointInfo) -> str:
    """The name of the family that trains this checkpoint; UserError where there is none."""
    for name, row in FAMILIES.items():
        if checkpoint.kind in row.kinds:
            return name
    trained = " or a ".join(KINDS[kind] for row in FAMILIES.values() for kind in row.kinds)
    raise UserError(
        f"--pretrained_model_name_or_path: {checkpoint.path} is a {checkpoint.description}; "
        f"this version trains a {trained}"
    )


def family_class(name: str) -> type:
    module_name, _, class_name = FAMILIES[name].path.partition(":")
    return getattr(importlib.import_module(module_name), class_name)
