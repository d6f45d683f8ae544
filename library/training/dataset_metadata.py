"""What a network file tells of the dataset it was trained with."""

import json
from typing import Any

from library.dataset.buckets import bucket_info
from library.dataset.config import SubsetOptions
from library.dataset.dataset import TrainingDataset
from library.dataset.scan import ScannedDataset, dataset_dirs, reg_dataset_dirs, tag_frequency
from library.options.derived import resolution_wh
from library.options.groups import TrainNetworkOptions
from library.training.plan import StepPlan

SUBSET_FIELDS = [
    "num_repeats", "color_aug", "flip_aug", "random_crop", "shuffle_caption", "keep_tokens", "keep_tokens_separator",
    "secondary_separator", "enable_wildcard", "caption_prefix", "caption_suffix", "resize_interpolation",
]  # fmt: skip
FLAGS_OF_ONE_DATASET = [
    "color_aug", "flip_aug", "random_crop", "shuffle_caption", "enable_bucket", "bucket_no_upscale", "min_bucket_reso",
    "max_bucket_reso", "keep_tokens",
]  # fmt: skip


def dataset_fields(dataset: TrainingDataset, options: TrainNetworkOptions, plan: StepPlan) -> dict[str, object]:
    """The ss_ fields of the dataset; kohya writes others for --dataset_config than for the flags."""
    common = {
        "ss_seed": dataset.seed,  # also where the user gave none, so that the run can be repeated
        "ss_num_train_images": dataset.num_train_images,
        "ss_num_reg_images": dataset.num_reg_images,
        "ss_num_validation_images": dataset.scanned.num_held_out,
        "ss_tag_frequency": json.dumps(tag_frequency(dataset.scanned)),
        "ss_dataset_dirs": json.dumps(dataset_dirs(dataset.scanned)),
    }
    if options.dataset_config:
        return common | {"ss_datasets": json.dumps(datasets_of_config(dataset))}
    return common | fields_of_flags(dataset, options, plan)


def fields_of_flags(dataset: TrainingDataset, options: TrainNetworkOptions, plan: StepPlan) -> dict[str, object]:
    buckets = bucket_info(dataset.choices, dataset.repeats) if options.enable_bucket else None
    return {
        **{f"ss_{name}": getattr(options, name) for name in FLAGS_OF_ONE_DATASET},
        "ss_batch_size_per_device": options.train_batch_size,
        "ss_total_batch_size": options.train_batch_size * plan.num_processes * plan.accumulation,
        "ss_resolution": resolution_wh(options),
        "ss_reg_dataset_dirs": json.dumps(reg_dataset_dirs(dataset.scanned)),
        "ss_bucket_info": json.dumps(buckets),
    }


def datasets_of_config(dataset: TrainingDataset) -> list[dict[str, Any]]:
    """One entry for each [[datasets]] with its subsets."""
    scanned = dataset.scanned
    entries = []
    for number, spec in enumerate(scanned.specs):
        mine = [i for i, r in enumerate(scanned.records) if scanned.subsets[r.subset].dataset == number]
        counts = {is_reg: _num_images(scanned, mine, is_reg) for is_reg in (False, True)}
        buckets = bucket_info([dataset.choices[i] for i in mine], [dataset.repeats[i] for i in mine])
        frequency = tag_frequency(_part(scanned, mine))
        entries.append(
            {
                "is_dreambooth": not any(s.metadata_file for s in scanned.subsets if s.dataset == number),
                "batch_size_per_device": spec.batch_size,
                "num_train_images": counts[False],
                "num_reg_images": counts[True],
                "resolution": list(resolution_wh(spec)),
                "enable_bucket": spec.enable_bucket,
                "min_bucket_reso": spec.min_bucket_reso,
                "max_bucket_reso": spec.max_bucket_reso,
                "tag_frequency": frequency,
                "bucket_info": buckets if spec.enable_bucket else None,
                "resize_interpolation": spec.resize_interpolation,
                "subsets": [
                    _subset_entry(scanned, index) for index, s in enumerate(scanned.subsets) if s.dataset == number
                ],
            }
        )
    return entries


def _num_images(scanned: ScannedDataset, indices: list[int], is_reg: bool) -> int:
    subsets = [scanned.subsets[scanned.records[index].subset] for index in indices]
    return sum(subset.num_repeats for subset in subsets if subset.is_reg == is_reg)


def _part(scanned: ScannedDataset, indices: list[int]) -> ScannedDataset:
    return ScannedDataset(scanned.subsets, [scanned.records[index] for index in indices], [], scanned.specs)


def _subset_entry(scanned: ScannedDataset, index: int) -> dict[str, Any]:
    subset: SubsetOptions = scanned.subsets[index]
    entry = {"img_count": sum(record.subset == index for record in scanned.records)}
    entry |= {name: getattr(subset, name) for name in SUBSET_FIELDS}
    if subset.image_dir:
        entry["image_dir"] = subset.image_dir.name
    if subset.metadata_file:
        return entry | {"metadata_file": subset.metadata_file.name}
    return entry | {"class_tokens": subset.class_tokens, "is_reg": subset.is_reg}
