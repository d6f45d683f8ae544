"""Model families by name, and which checkpoints each of them trains. Needs no torch."""

import importlib
from dataclasses import dataclass
from typing import Any

from library.errors import UserError
from library.families.detect import CheckpointInfo
from library.families.kinds import KINDS


@dataclass(frozen=True)
class FamilyRow:
    """Where a family's class is, the kinds of checkpoint it takes, and what must be known of it before torch is."""

    path: str  # "module:Class", imported only when chosen
    text_widths: dict[str, int]  # by kind of checkpoint (a key of KINDS): features of the text that its U-Net takes
    num_blocks: int  # residual and transformer blocks of its U-Net
    bucket_step: int  # pixels; what the sides of buckets must be divisible by
    num_text_encoders: int = 1
    text_files: bool = False  # whether the outputs of its text encoders have files beside the pictures, as kohya's do
    text_layer: str | None = None  # in words, where it is always the same; None where --clip_skip chooses it
    usual_side: int = 512  # of pictures, in pixels
    takes_sizes: bool = False  # whether sizes and crops are conditioning
    network_names: str | None = None  # regular expression of layers of networks that no other family has

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(self.text_widths)


FAMILIES = {
    "sd": FamilyRow("library.families.sd:Sd", {"sd1": 768, "sd2": 1024}, num_blocks=38, bucket_step=64),
    "sdxl": FamilyRow(
        "library.families.sdxl:Sdxl",
        {"sdxl": 2048},
        num_blocks=87,
        bucket_step=32,
        num_text_encoders=2,
        text_files=True,
        text_layer="the layer before the last",
        usual_side=1024,
        takes_sizes=True,
        network_names="lora_te[12]_|lora_unet_(input_blocks|middle_block|output_blocks)_",
    ),
}


def row_of_kind(kind: str) -> FamilyRow | None:
    """The family that trains this kind of checkpoint; None where none does."""
    return next((row for row in FAMILIES.values() if kind in row.kinds), None)


def family_of_kind(checkpoint: CheckpointInfo, wanted: str | None = None) -> str:
    """The name of the family that trains this checkpoint; UserError where there is none, or another is wanted."""
    rows = {name: row for name, row in FAMILIES.items() if wanted in (None, name)}
    for name, row in rows.items():
        if checkpoint.kind in row.kinds:
            return name
    trained = " or a ".join(KINDS[kind].description for row in rows.values() for kind in row.kinds)
    who = "this version" if wanted is None else "this script"
    advice = "use train_network.py" if row_of_kind(checkpoint.kind) else KINDS[checkpoint.kind].advice
    raise UserError(
        f"--pretrained_model_name_or_path: {checkpoint.path} is a {checkpoint.description}; {who} trains a {trained}"
        + (f"; {advice}" if advice else "")
    )


def writes_text(options: Any, family: str) -> bool:
    """Whether text encoder outputs are kept in files."""
    return options.cache_text_encoder_outputs_to_disk and FAMILIES[family].text_files


def family_class(name: str) -> type:
    module_name, _, class_name = FAMILIES[name].path.partition(":")
    return getattr(importlib.import_module(module_name), class_name)
