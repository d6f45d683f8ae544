"""Everything that can be checked before torch is imported: all mistakes in one list, and what a run will do."""

import difflib
import importlib
import importlib.util
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from tqdm import tqdm

from library.dataset.audit import Audit, audit_of
from library.dataset.buckets import BucketChoice, bucket_info, choose_buckets_of, repeats_of
from library.dataset.captions import possible_captions
from library.dataset.picture_files import Decoded
from library.dataset.picture_index import PictureIndex
from library.dataset.sampler import sampler_of
from library.dataset.scan import (
    ScannedDataset,
    as_decoded,
    scan_dataset,
    verify_pictures,
    write_info_caches,
)
from library.dataset.validation import split_validation
from library.disk_space import DiskNeed, check_disk_space, disk_needs
from library.errors import UserError, counted, quoted_list
from library.families import FAMILIES, family_of_kind, writes_text
from library.families.agreement import check_clip_skip, model_warnings
from library.families.detect import CheckpointInfo, inspect_checkpoint
from library.given_files import Shapes, check_network, check_thumbnail, check_vae
from library.leftovers import remove_leftovers
from library.options.derived import caches_text, chooses_own_rate, network_arguments, network_module, resumes_newest
from library.options.groups import TrainNetworkOptions
from library.options.honoured import warnings_for
from library.options.launch import launch_problems, launch_warnings
from library.options.places import in_place
from library.training.hub import check_uploads, fetch_state
from library.training.optimizers import check_optimizer, optimizer_warnings
from library.training.plan import StepPlan, is_main_process, num_processes, step_plan
from library.training.prompts import SamplePrompt, prompts_of
from library.training.resuming import check_state, resume_notes, state_to_resume
from library.training.tracker_checks import check_trackers

logger = logging.getLogger(__name__)

MIN_FREE_BYTES = 200_000_000
PIP_NAMES = {"lycoris": "lycoris-lora"}  # of packages that are imported by another name


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
    if options.vae:
        attempt(check_vae, options.vae)
    if options.metadata_thumbnail:
        attempt(check_thumbnail, options.metadata_thumbnail)
    for name in ("output_dir", "logging_dir"):
        if folder := getattr(options, name):
            problems.extend(check_writable(name, folder))
    problems.extend(check_network_module(options.network_module))
    problems.extend(check_optimizer(options))
    weights = None
    if options.network_weights:
        is_ours = network_module(options).startswith("networks.")
        weights = attempt(check_network, options.network_weights, "--network_weights", checkpoint, is_ours)
    for path in options.base_weights or []:
        attempt(check_network, path, "--base_weights", checkpoint, True)
    attempt(check_network_arguments, options, weights)
    prompts = attempt(prompts_of, options.sample_prompts) if options.sample_prompts else []
    return checkpoint, family, prompts


def preflight(options: TrainNetworkOptions, wanted_family: str | None = None) -> Preflight:
    """Check all that was given; a UserError names every problem found."""
    if is_main_process():
        remove_leftovers(folders_of_run(options))
    problems = Problems(launch_problems())
    attempt = problems.attempt
    checkpoint, family, prompts = look_at_files(options, wanted_family, problems)
    if is_main_process():
        attempt(check_trackers, options)
    index = PictureIndex()
    scanned, decoded = attempt(read_dataset, options, index) or (None, {})
    if scanned is not None:
        problems += bucket_step_problems(family, scanned) if family else []
        problems += text_cache_problems(options, scanned, family)
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
    cache_notes = write_info_caches(scanned) if is_main_process() else []
    scanned, validation = split
    scanned.notes += cache_notes
    choices, repeats = choose_buckets_of(scanned), repeats_of(scanned)
    plan = plan_of(options, scanned, choices, repeats)
    needs = disk_needs(options, checkpoint, family, scanned, choices, plan)
    warnings = check_disk_space(needs)
    audit = audit_of(options, scanned, choices, decoded, index)
    return Preflight(
        checkpoint, family, scanned, validation, choices, repeats, prompts, plan, resume, audit, needs, warnings
    )


def folders_of_run(options: TrainNetworkOptions) -> list[Path]:
    """Where a run of these options, or the one that it goes on from, may have been killed while it wrote."""
    output = Path(options.output_dir)
    of_state = [Path(options.resume).parent] if options.resume and not resumes_newest(options) else []
    return [output, output / "sample", *of_state]


def read_dataset(options: TrainNetworkOptions, index: PictureIndex) -> tuple[ScannedDataset, dict[Path, Decoded]]:
    """The dataset, and what its pictures turned out to be: each is decoded, so that a damaged one is named now.

    What `index` remembers is not read again; what is known in the end is kept, also after a mistake or Ctrl-C.
    """
    try:
        scanned = scan_dataset(options, index=index)
        with tqdm(desc="checking pictures", unit="pictures", delay=2) as bar:

            def progress(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            decoded = verify_pictures(scanned.records, progress=progress, index=index)
    finally:
        if is_main_process():
            index.write()
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


def report(options: TrainNetworkOptions, checked: Preflight) -> None:
    """Say what was found: the model, the dataset with its notes, the buckets, the steps."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return  # the first process says it for all
    warnings = warnings_for(options) + optimizer_warnings(options) + launch_warnings(options)
    for warning in in_place(warnings + model_warnings(options, checked.checkpoint), options):
        logger.warning(warning)
    logger.info("base model: %s, a %s", checked.checkpoint.path, checked.checkpoint.description)
    records, subsets = checked.scanned.records, checked.scanned.subsets
    for index, subset in enumerate(subsets):
        mine = [record for record in records if record.subset == index]
        captioned = sum(record.caption_found for record in mine)
        pictures = counted(len(mine), "regularisation picture" if subset.is_reg else "picture")
        repeats = counted(subset.num_repeats, "repeat")
        logger.info("%s: %s x %s, %d with captions", subset.source, pictures, repeats, captioned)
    if options.masked_loss and not any(r.mask_path or subsets[r.subset].alpha_mask for r in records):
        logger.warning("--masked_loss has no effect: no pictures have masks (conditioning_data_dir, or alpha_mask)")
    if options.prior_loss_weight != 1 and not any(subset.is_reg for subset in subsets):
        logger.warning("--prior_loss_weight has no effect: there are no regularisation pictures")
    if options.cache_text_encoder_outputs_to_disk and not FAMILIES[checked.family].text_files:
        logger.warning(
            "--cache_text_encoder_outputs_to_disk has no effect on this model: outputs are kept in memory, "
            "and computed once at every start"
        )
    notes = validation_notes(options, checked) + warmup_notes(options, checked.plan) + checked.disk_warnings
    for note in checked.scanned.notes + checked.audit.warnings + notes:
        logger.warning(note)
    for note in resume_notes(options, checked.plan, checked.resume) if checked.resume else ():
        logger.warning(note)
    if checked.validation:
        logger.info("validation: held out of training: %s", counted(len(checked.validation.records), "picture"))
    if options.dataset_class:
        logger.info("%s: batches of a class of your own", options.dataset_class)
        batch_sizes = [getattr(checked.scanned.own, "batch_size", 1)]
    else:
        batch_sizes = [spec.batch_size for spec in checked.scanned.specs]
        log_sizes(checked)
    logger.info("steps: %s", checked.plan.sentence(batch_sizes))


def log_sizes(checked: Preflight) -> None:
    """How many pictures are trained at which size."""
    buckets = bucket_info(checked.choices, checked.repeats)["buckets"].values()
    sizes = ", ".join(f"{b['resolution'][0]}x{b['resolution'][1]}: {b['count']}" for b in buckets)
    logger.info("sizes trained (with repeats): %s", sizes)


def validation_notes(options: TrainNetworkOptions, checked: Preflight) -> list[str]:
    """A sentence for each option of validation that is set while no pictures are held out."""
    if checked.validation:
        return []
    is_asked_for = any(spec.validation_split for spec in checked.scanned.specs)
    reason = ": no pictures are held out" if is_asked_for else " without --validation_split"
    names = ("validation_seed", "validate_every_n_steps", "validate_every_n_epochs", "max_validation_steps")
    given = [name for name in names if getattr(options, name) is not None]
    return [f"--{name} has no effect{reason}" for name in given]


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


def warmup_notes(options: TrainNetworkOptions, plan: StepPlan) -> list[str]:
    """A sentence where the run ends before its warm-up."""
    warmup, total = options.lr_warmup_steps, plan.max_train_steps
    if chooses_own_rate(options) or (warmup < 1 if isinstance(warmup, float) else warmup < total):
        return []
    given = f"{warmup:.0%}" if isinstance(warmup, float) else warmup
    return [f"--lr_warmup_steps {given} is not below all steps, {total}: the learning rate is never reached"]


def check_network_module(name: str | None) -> list[str]:
    """Problems with --network_module; None stands for networks.lora. Nothing is imported, as that may need torch."""
    if name is None:
        return []
    package, *inside = name.split(".")
    spec = importlib.util.find_spec(package)
    if spec is None:
        pip_name = PIP_NAMES.get(package)
        remedy = (
            f"pip install {pip_name}" if pip_name else "networks of this project are called networks.lora and so on"
        )
        return [f"--network_module {name} needs the package {package}, which is not installed: {remedy}"]
    folders = [Path(folder).joinpath(*inside[:-1]) for folder in spec.submodule_search_locations or []]
    there = {path.name.split(".")[0]: path for folder in folders if folder.is_dir() for path in folder.iterdir()}
    if not inside or (inside[-1] in there and (package != "networks" or makes_networks(there[inside[-1]]))):
        return []
    if package == "networks":
        known = ", ".join(f"networks.{module}" for module, path in sorted(there.items()) if makes_networks(path))
        return [f"--network_module: there is no network {name} here; there is {known}"]
    near = difflib.get_close_matches(inside[-1], there, 1)
    hint = f"; did you mean {'.'.join([package, *inside[:-1], near[0]])}?" if near else ""
    return [f"--network_module: there is no module {name}{hint}"]


def check_network_arguments(options: TrainNetworkOptions, weights: Shapes | None) -> None:
    """UserError for --network_args, or ranks beside --network_weights, that the network cannot take.

    As far as that can be told without torch.
    """
    arguments = network_arguments(options)
    name = f"{network_module(options)}_arguments"
    if not name.startswith("networks.") or not importlib.util.find_spec(name):
        return
    module = importlib.import_module(name)
    module.check_arguments(arguments)
    if weights and not options.dim_from_weights and hasattr(module, "check_ranks"):
        module.check_ranks(weights, options.network_weights, options.network_dim, arguments)


def makes_networks(path: Path) -> bool:
    return path.suffix == ".py" and "def create_network" in path.read_text("utf-8")


def check_writable(name: str, folder_text: str) -> list[str]:
    """Problems with a folder that files go to: it is made where it is missing, and must be writable."""
    folder = Path(folder_text)
    existing = next((parent for parent in (folder, *folder.absolute().parents) if parent.exists()), None)
    if existing is None or not existing.is_dir():
        return [f"--{name}: {folder} cannot be made, because {existing} is a file"]
    if not os.access(existing, os.W_OK):
        return [f"--{name}: {folder} cannot be written to (no permission); give a folder of your own"]
    free = shutil.disk_usage(existing).free
    if free < MIN_FREE_BYTES:
        return [f"--{name}: the disk of {folder} has only {free / 1e6:.0f} MB left; make room or give another"]
    return []
