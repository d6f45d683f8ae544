"""Everything that can be checked before torch is imported: all mistakes in one list, and what is known of a run."""

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

from tqdm import tqdm

from library.dataset.audit import Audit, audit_of
from library.dataset.buckets import BucketChoice, choose_buckets_of, repeats_of
from library.dataset.captions import possible_captions
from library.dataset.dataset_config import read_dataset_config
from library.dataset.picture_files import Decoded
from library.dataset.picture_index import PictureIndex
from library.dataset.repeat_folders import subsets_from_folders
from library.dataset.sampler import sampler_of
from library.dataset.scan import (
    ScannedDataset,
    as_decoded,
    scan_dataset,
    unreadable_pictures,
    verify_pictures,
    write_info_caches,
)
from library.dataset.validation import split_validation
from library.disk_space import DiskNeed, check_disk_space, disk_needs
from library.errors import UserError, quoted_list
from library.families import FAMILIES, family_of_kind, writes_text
from library.families.agreement import check_blocks_to_swap, check_clip_skip
from library.families.detect import CheckpointInfo, inspect_checkpoint
from library.folders import cache_folder_problems, check_writable
from library.given_files import check_lora_keys, check_network, check_thumbnail, check_vae
from library.leftovers import remove_leftovers
from library.network_choice import check_network_arguments, check_network_module, check_network_steps
from library.options.derived import DEFAULT_NETWORK, caches_text, network_module, resumes_newest
from library.options.groups import TrainNetworkOptions
from library.options.launch import launch_problems
from library.training.hub import check_uploads, fetch_state
from library.training.optimizer_names import check_optimizer_name, check_schedule_name
from library.training.optimizers import check_optimizer
from library.training.plan import StepPlan, is_main_process, num_processes, step_plan
from library.training.prompts import SamplePrompt, prompts_of
from library.training.resuming import check_state, state_to_resume
from library.training.running import check_not_running, check_place
from library.training.tracker_checks import check_trackers


@dataclass(frozen=True)
class Preflight:
    """What is known of a run before anything heavy is loaded."""

    checkpoint: CheckpointInfo
    family: str  # a key of library.families.FAMILIES
    scanned: ScannedDataset
    validation: ScannedDataset | None  # pictures held out of training
    choices: list[BucketChoice]  # of every record
    repeats: list[int]  # how often each record is drawn in an epoch
    prompts: list[SamplePrompt]
    plan: StepPlan
    resume: Path | None  # the state folder to go on from
    audit: Audit
    disk_needs: list[DiskNeed]
    disk_warnings: list[str]
    damaged: list[str]  # pictures that were left out, with reasons; of a dry run alone


class Problems(list[str]):
    """The problems found so far."""

    def attempt(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What the function returns; None where it raises a UserError, whose problems are kept."""
        try:
            return function(*arguments)
        except UserError as error:
            self.extend(error.problems)
            return None


def problems_of_files(options: TrainNetworkOptions, wanted_family: str | None = None) -> list[str]:
    """What is wrong with all but the pictures, for options that have problems of their own."""
    problems = Problems(launch_problems())
    look_at_files(options, wanted_family, problems)
    problems.attempt(look_at_dataset, options)
    return problems


def look_at_files(
    options: TrainNetworkOptions, wanted_family: str | None, problems: Problems
) -> tuple[CheckpointInfo | None, str | None, list[SamplePrompt]]:
    """The base model, its family and the prompts, after a look at all that takes no time; options may be missing."""
    attempt, path = problems.attempt, options.pretrained_model_name_or_path
    checkpoint = attempt(inspect_checkpoint, path) if path else None
    family = attempt(family_of_kind, checkpoint, wanted_family) if checkpoint else None
    if checkpoint:
        attempt(check_clip_skip, options, checkpoint)
        attempt(check_blocks_to_swap, options, checkpoint)
    if options.vae:
        attempt(check_vae, options.vae, checkpoint)
    if options.metadata_thumbnail:
        attempt(check_thumbnail, options.metadata_thumbnail)
    if options.cover_image not in (None, "auto"):
        attempt(check_thumbnail, options.cover_image, "--cover_image")
    for name in ("output_dir", "logging_dir"):
        if folder := getattr(options, name):
            problems.extend(check_writable(name, folder))
    problems.extend(check_network_module(options.network_module))
    problems.extend(precision_problems(options))
    problems.extend(check_optimizer(options))
    attempt(check_optimizer_name, options)
    attempt(check_schedule_name, options)
    weights = None
    if options.network_weights:
        is_ours = network_module(options).startswith("networks.")
        weights = attempt(check_network, options.network_weights, "--network_weights", checkpoint, is_ours)
        if weights and network_module(options) == DEFAULT_NETWORK:
            attempt(check_lora_keys, options.network_weights, "--network_weights", weights)
    for path in options.base_weights or []:
        if base_weights := attempt(check_network, path, "--base_weights", checkpoint, True):
            attempt(check_lora_keys, path, "--base_weights", base_weights)
    attempt(check_network_arguments, options, weights)
    prompts = attempt(prompts_of, options.sample_prompts) if options.sample_prompts else []
    return checkpoint, family, prompts


def look_at_dataset(options: TrainNetworkOptions) -> None:
    """UserError for what is wrong with the folders or the file of the dataset, without a look at pictures."""
    if options.dataset_config:
        read_dataset_config(options)
    elif not (options.dataset_class or options.in_json):
        subsets_from_folders(options)


def preflight(options: TrainNetworkOptions, wanted_family: str | None = None) -> Preflight:
    """Check all that was given; a UserError names every problem found.

    What is known of the pictures in the end is kept, also after a mistake or Ctrl-C.
    """
    index = PictureIndex()
    try:
        return _preflight(options, wanted_family, index)
    finally:
        if is_main_process():
            index.write()


def _preflight(options: TrainNetworkOptions, wanted_family: str | None, index: PictureIndex) -> Preflight:
    if is_main_process():
        remove_leftovers(folders_of_run(options))
    problems = Problems(launch_problems())
    attempt = problems.attempt
    checkpoint, family, prompts = look_at_files(options, wanted_family, problems)
    attempt(check_place, options)
    if is_main_process():
        attempt(check_trackers, options)
        if not (options.dry_run or options.debug_dataset):
            attempt(check_not_running, options)
    damaged: list[str] | None = [] if options.dry_run else None
    scanned, decoded = attempt(read_dataset, options, index, damaged) or (None, {})
    if scanned is not None:
        problems += bucket_step_problems(family, scanned) if family else []
        problems += text_cache_problems(options, scanned, family)
        problems += cache_folder_problems(options, family, scanned)
    split = scanned and attempt(split_validation, scanned, options.seed, options.dataset_config)
    resume = None if options.resume_from_huggingface else attempt(state_to_resume, options)
    if resume:
        attempt(check_state, options, resume)
    if options.huggingface_repo_id and not problems and is_main_process() and not options.dry_run:
        attempt(check_uploads, options)
    if problems:
        raise UserError(*problems)
    if options.resume_from_huggingface and not options.dry_run:
        resume = fetch_state(options)
        check_state(options, resume)
    cache_notes = write_info_caches(scanned) if is_main_process() and not options.dry_run else []
    scanned, validation = split
    scanned.notes += cache_notes
    choices, repeats = choose_buckets_of(scanned), repeats_of(scanned)
    plan = plan_of(options, scanned, choices, repeats)
    check_network_steps(options, plan.max_train_steps)
    needs = disk_needs(options, checkpoint, family, scanned, choices, plan)
    warnings = check_disk_space(needs)
    audit = audit_of(options, scanned, choices, decoded, index)
    return Preflight(
        checkpoint,
        family,
        scanned,
        validation,
        choices,
        repeats,
        prompts,
        plan,
        resume,
        audit,
        needs,
        warnings,
        damaged or [],
    )


def folders_of_run(options: TrainNetworkOptions) -> list[Path]:
    """Where a run of these options, or the one that it goes on from, may have been killed while it wrote."""
    output = Path(options.output_dir)
    of_state = [Path(options.resume).parent] if options.resume and not resumes_newest(options) else []
    return [output, output / "sample", *of_state]


def read_dataset(
    options: TrainNetworkOptions, index: PictureIndex, damaged: list[str] | None
) -> tuple[ScannedDataset, dict[Path, Decoded]]:
    """The dataset, and what its pictures turned out to be: each is decoded, so that a damaged one is named now.

    What `index` remembers is not read again. Where `damaged` is a list, the damaged pictures go there instead of into a
    UserError, as long as others are left.
    """
    scanned = scan_dataset(options, index=index, damaged=damaged)
    with tqdm(desc="checking pictures", unit="pictures", delay=2) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        decoded = verify_pictures(scanned.records, progress=progress, index=index, damaged=damaged)
    if damaged:
        whole = [record for record in scanned.records if record.is_gone or record.file in decoded]
        if not whole:
            raise UserError(unreadable_pictures(damaged))
        scanned = replace(scanned, records=whole)
    return as_decoded(scanned, decoded), decoded


def plan_of(
    options: TrainNetworkOptions, scanned: ScannedDataset, choices: list[BucketChoice], repeats: list[int]
) -> StepPlan:
    """The step arithmetic of the dataset as it will be drawn."""
    if scanned.own is not None:
        num_items = len(scanned.own) * getattr(scanned.own, "batch_size", 1)
        return step_plan(options, num_items, ceil(len(scanned.own) / num_processes()), num_processes())
    sampler = sampler_of(scanned, choices, repeats, seed=0, num_processes=num_processes())
    return step_plan(options, sum(repeats), len(sampler), num_processes())


def bucket_step_problems(family: str, scanned: ScannedDataset) -> list[str]:
    """A sentence for each dataset whose buckets are of sizes that this family cannot take."""
    divisor = FAMILIES[family].bucket_step
    return [
        f"--bucket_reso_steps must be a multiple of {divisor} for this model, got {spec.bucket_reso_steps}"
        + (f" in datasets[{number}]" if len(scanned.specs) > 1 else "")
        for number, spec in enumerate(scanned.specs)
        if spec.enable_bucket and spec.bucket_reso_steps % divisor
    ]


def text_cache_problems(options: TrainNetworkOptions, scanned: ScannedDataset, family: str | None) -> list[str]:
    """Why text encoders' outputs cannot be kept, where that is asked for; a file has room for one caption."""
    if not caches_text(options):
        return []
    in_files = family is not None and writes_text(options, family)
    changing = {
        str(scanned.subsets[record.subset].source)
        for record in scanned.records
        if (captions := possible_captions(record.caption, scanned.subsets[record.subset])) is None
        or (in_files and len(captions) > 1)
    }
    if not changing:
        return []
    flag, more = ("_to_disk", "caption_dropout_rate, caption_dropout_every_n_epochs, ") if in_files else ("", "")
    return [
        f"--cache_text_encoder_outputs{flag} does not go with captions that change (shuffle_caption, enable_wildcard, "
        f"{more}caption_tag_dropout_rate, token_warmup_step), as those of {quoted_list(sorted(changing))} do"
    ]


def precision_problems(options: TrainNetworkOptions) -> list[str]:
    """A sentence where the installed torch is a build for the CPU, as its version tells, and fp16 is asked for."""
    if options.mixed_precision != "fp16":
        return []
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return []
    if not version.endswith("+cpu"):
        return []
    return [
        f"--mixed_precision fp16 needs a GPU, and the torch that is installed, {version}, is for the CPU alone; "
        "give bf16 or no, or install torch for your GPU"
    ]
