"""Which pictures are held out of training, and how they are seen: the same way every time. Needs no torch."""

import math
import random
from dataclasses import replace

from library.dataset.config import SubsetOptions
from library.dataset.scan import ImageRecord, ScannedDataset
from library.errors import UserError, counted, quoted_list


def split_validation(
    scanned: ScannedDataset, seed: int | None, config_path: str | None = None
) -> tuple[ScannedDataset, ScannedDataset | None]:
    """The pictures to train, and those held out by each dataset's `validation_split`; None where there are none.

    The choice depends on `validation_seed`, or else on `seed`, and on the pictures of a folder alone, so that a folder
    that stands in several datasets has the same pictures held out in each.
    """
    train, held_out, notes = [], [], []
    for index, subset in enumerate(scanned.subsets):
        spec = scanned.specs[subset.dataset]
        records = [record for record in scanned.records if record.subset == index]
        chosen = spec.validation_seed if spec.validation_seed is not None else seed
        share = 0.0 if subset.is_reg else spec.validation_split
        kept, rest = split_records(records, share, chosen or 0)
        if share and records and not rest:
            total = counted(len(records), "picture")
            notes.append(f"{subset.source}: validation_split {share:g} of {total} holds out none")
        train += kept
        held_out += rest
    if held_out and all(scanned.subsets[record.subset].is_reg for record in train):
        whole = [f"datasets[{number}]" for number, spec in enumerate(scanned.specs) if spec.validation_split == 1]
        place = f"validation_split of {quoted_list(whole)}"  # the flag itself is below 1
        raise UserError(f"{config_path}: {place} leaves no pictures to train; give a smaller share")
    if not held_out:
        return replace(scanned, notes=scanned.notes + notes), None
    validation = ScannedDataset([_plain(subset) for subset in scanned.subsets], held_out, [], scanned.specs)
    return replace(scanned, records=train, notes=scanned.notes + notes, num_held_out=len(held_out)), validation


def split_records(records: list[ImageRecord], share: float, seed: int) -> tuple[list[ImageRecord], list[ImageRecord]]:
    """Training and held-out pictures, each in their old order: kohya's shuffle, the last `share` of it held out."""
    shuffled = list(range(len(records)))
    random.Random(seed).shuffle(shuffled)
    num_train = math.ceil(round(len(records) * (1 - share), 9))
    kept = set(shuffled[:num_train])
    train = [record for index, record in enumerate(records) if index in kept]
    return train, [record for index, record in enumerate(records) if index not in kept]


def _plain(subset: SubsetOptions) -> SubsetOptions:
    """The subset without anything that changes from draw to draw."""
    return replace(
        subset,
        num_repeats=1,
        shuffle_caption=False,
        token_warmup_step=0,
        caption_dropout_rate=0.0,
        caption_dropout_every_n_epochs=0,
        caption_tag_dropout_rate=0.0,
        color_aug=False,
        flip_aug=False,
        random_crop=False,
        face_crop_aug_range=None,
    )
