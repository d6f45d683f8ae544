"""What a run says of itself before anything heavy is loaded: the model, the dataset, the steps, and all warnings."""

import logging
import os
import re
from pathlib import Path

from library.dataset.buckets import bucket_info
from library.errors import counted, quoted_list
from library.families import FAMILIES
from library.families.agreement import model_warnings
from library.options.derived import chooses_own_rate, resolution_wh
from library.options.groups import TrainNetworkOptions
from library.options.honoured import warnings_for
from library.options.launch import launch_warnings
from library.options.places import in_place
from library.preflight import Preflight
from library.training.optimizer_names import rate_warnings
from library.training.optimizers import optimizer_warnings
from library.training.plan import StepPlan, save_every_n_epochs
from library.training.resuming import resume_notes
from library.training.saving import OutputNames

logger = logging.getLogger(__name__)


def report(options: TrainNetworkOptions, checked: Preflight) -> None:
    """Say what was found: the model, the dataset with its notes, the buckets, the steps."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return  # the first process says it for all
    warnings = warnings_for(options) + optimizer_warnings(options) + rate_warnings(options) + launch_warnings(options)
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
    notes = validation_notes(options, checked) + warmup_notes(options, checked.plan) + dataset_notes(checked)
    notes += output_notes(options, checked)
    notes += checked.disk_warnings
    for note in checked.scanned.notes + checked.audit.warnings + notes:
        logger.warning(note)
    goes_on = checked.resume is not None
    for note in resume_notes(options, checked.plan, checked.resume) if goes_on else overwriting(options, checked):
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


def overwriting(options: TrainNetworkOptions, checked: Preflight) -> list[str]:
    """A sentence where a run that begins at the beginning writes over networks of an earlier one."""
    names, plan = OutputNames(options), checked.plan
    if options.dry_run or options.debug_dataset or not names.folder.is_dir():
        return []
    saves = [
        (names.epoch, save_every_n_epochs(options, plan.num_epochs), plan.num_epochs - 1),
        (names.step, options.save_every_n_steps, plan.max_train_steps),
    ]

    def is_written(path: Path) -> bool:
        count = re.search(r"-(?:step)?(\d{1,18})$", path.stem)
        number = int(count[1]) if count else 0
        return path == names.final() or any(
            every and 0 < number <= last and number % every == 0 and path == name_of(number)
            for name_of, every, last in saves
        )

    found = [path.name for path in sorted(names.folder.iterdir()) if is_written(path)]
    if not found:
        return []
    has_state = any(names.is_state(path.name) for path in names.folder.iterdir())
    instead = "--resume auto to go on where it ended" if has_state else "another --output_name to keep them"
    return [f"{names.folder} has files of an earlier run that are overwritten: {quoted_list(found, 3)}; give {instead}"]


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


def dataset_notes(checked: Preflight) -> list[str]:
    """A sentence for each dataset whose resolution no bucket has, or whose batches can never be full."""
    notes, scanned = [], checked.scanned
    for number, spec in enumerate(scanned.specs):
        of = f"datasets[{number}]: " if len(scanned.specs) > 1 else ""
        sides, step = resolution_wh(spec), spec.bucket_reso_steps
        if spec.enable_bucket and any(side % step for side in sides):
            notes.append(
                f"{of}resolution {sides[0]}x{sides[1]} is no multiple of {step} (bucket_reso_steps): "
                "no bucket is of this size, all are within its area"
            )
        mine = [i for i, record in enumerate(scanned.records) if scanned.subsets[record.subset].dataset == number]
        num_draws = sum(checked.repeats[index] for index in mine)
        if spec.batch_size > num_draws:
            notes.append(
                f"{of}a batch of {spec.batch_size} pictures (train_batch_size) is never full: an epoch has "
                f"{counted(num_draws, 'picture')}, repeats included"
            )
    return notes


def output_notes(options: TrainNetworkOptions, checked: Preflight) -> list[str]:
    """A sentence where pictures that runs draw would be among those that are trained."""
    output = Path(options.output_dir)
    read = [subset.image_dir for subset in checked.scanned.subsets if subset.image_dir]
    if not output.is_dir() or not any(output.samefile(folder) for folder in read if folder.is_dir()):
        return []
    return [
        f"--output_dir {output} is a folder of training pictures: what is drawn there (before_after.png, sheets of "
        "--debug_dataset) is trained from the next run on; give another"
    ]


def warmup_notes(options: TrainNetworkOptions, plan: StepPlan) -> list[str]:
    """A sentence where the run ends before its warm-up."""
    warmup, total = options.lr_warmup_steps, plan.max_train_steps
    if chooses_own_rate(options) or (warmup < 1 if isinstance(warmup, float) else warmup < total):
        return []
    given = f"{warmup:.0%}" if isinstance(warmup, float) else warmup
    return [f"--lr_warmup_steps {given} is not below all steps, {total}: the learning rate is never reached"]
