"""What the caching scripts check before torch is imported: model, pictures, room for the files."""

import logging
from dataclasses import dataclass

from library.dataset.buckets import choose_buckets_of
from library.dataset.picture_index import PictureIndex
from library.dataset.scan import ScannedDataset
from library.dataset.validation import split_validation
from library.disk_space import cache_needs, check_disk_space
from library.errors import UserError
from library.families import FAMILIES, family_of_kind
from library.families.agreement import check_clip_skip, model_warnings
from library.families.detect import CheckpointInfo, inspect_checkpoint
from library.folders import cache_folder_problems
from library.given_files import check_vae
from library.options.caching import CachingOptions, warnings_for_caching
from library.options.launch import launch_problems
from library.options.places import in_place
from library.preflight import Problems, bucket_step_problems, precision_problems, read_dataset, text_cache_problems
from library.training.plan import is_main_process

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CachingPreflight:
    """What is known before anything heavy is loaded."""

    family: str  # a key of library.families.FAMILIES
    datasets: list[ScannedDataset]  # the pictures to train, and those that are held out, where there are any

    @property
    def num_pictures(self) -> int:
        return sum(len(dataset.records) for dataset in self.datasets)


def caching_preflight(options: CachingOptions) -> CachingPreflight:
    """Check all that was given, and say what was found; a UserError names every problem."""
    index = PictureIndex()
    try:
        return _caching_preflight(options, index)
    finally:
        if is_main_process():
            index.write()


def _caching_preflight(options: CachingOptions, index: PictureIndex) -> CachingPreflight:
    problems = Problems(launch_problems() + precision_problems(options))
    checkpoint, family = _look_at_model(options, problems)
    scanned, _ = problems.attempt(read_dataset, options, index, None) or (None, {})
    if scanned is not None and family is not None:
        problems += bucket_step_problems(family, scanned)
        problems += text_cache_problems(options, scanned, family)
        problems += cache_folder_problems(options, family, scanned)
    split = scanned and problems.attempt(split_validation, scanned, options.seed, options.dataset_config)
    if problems:
        raise UserError(*problems)
    datasets = [dataset for dataset in split if dataset is not None]
    warnings = warnings_for_caching(options) + model_warnings(options, checkpoint) + scanned.notes
    for dataset in datasets:
        warnings += check_disk_space(cache_needs(options, family, dataset, choose_buckets_of(dataset)))
    for warning in in_place(warnings, options):
        logger.warning(warning)
    logger.info("base model: %s, a %s", checkpoint.path, checkpoint.description)
    return CachingPreflight(family, datasets)


def _look_at_model(options: CachingOptions, problems: Problems) -> tuple[CheckpointInfo | None, str | None]:
    attempt = problems.attempt
    checkpoint = attempt(inspect_checkpoint, options.pretrained_model_name_or_path)
    family = attempt(family_of_kind, checkpoint, "sdxl" if options.sdxl else None) if checkpoint else None
    if checkpoint:
        attempt(check_clip_skip, options, checkpoint)
    if options.vae:
        attempt(check_vae, options.vae, checkpoint)
    if family and options.cache_text_encoder_outputs_to_disk and not FAMILIES[family].text_files:
        problems.append(
            f"--pretrained_model_name_or_path: {checkpoint.path} is a {checkpoint.description}: the outputs of its "
            "text encoder have no files, every run computes them when it starts"
        )
    return checkpoint, family
