"""Which state a run goes on from, whether it fits the run, and where in the run it is. Needs no torch."""

import logging
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

from library.errors import UserError, counted
from library.families.detect import read_shapes
from library.network_rules import rules_without_torch
from library.options.derived import network_arguments, network_module, optimizer_name, resumes_newest
from library.options.groups import TrainNetworkOptions
from library.texts import read_json
from library.training.losses import Curves, LossRecorder
from library.training.optimizers import find_spec
from library.training.plan import StepPlan
from library.training.saving import STATE_FILE, LoopState, OutputNames, SkipCount

logger = logging.getLogger(__name__)

Shapes = dict[str, tuple[int, ...] | None]
WEIGHTS_FILE = "model.safetensors"  # names are accelerate's
OPTIMIZER_FILE = "optimizer.bin"
SCHEDULE_FILE = "scheduler.bin"  # kohya's scripts write none for optimizers without a schedule
SCALER_FILE = "scaler.pt"
LATER = ("skipped", "curves")  # what states of older versions lack
MORE_FILE = "custom_checkpoint_0.pkl"  # of runs that keep more, such as averages of weights
OPTIONAL_FILES = SCHEDULE_FILE, MORE_FILE
FACTS = {name: type(value) for name, value in LoopState().facts().items() if name not in LATER}
PARTS = {
    "lora_te": ("text encoder", "network_train_unet_only"),
    "lora_unet": ("U-Net", "network_train_text_encoder_only"),
}


def state_to_resume(options: TrainNetworkOptions) -> Path | None:
    """The folder that --resume names on this computer, None where training starts at the beginning."""
    if not resumes_newest(options):
        return Path(options.resume) if options.resume else None
    folder = newest_state(OutputNames(options))
    if folder is None:
        logger.info("--resume auto: no state of this run in %s; training starts at the beginning", options.output_dir)
    else:
        logger.info("--resume auto: %s", folder)
    return folder


def newest_state(names: OutputNames) -> Path | None:
    """The whole state of this run that was written last; of equally old ones, that with the most steps."""
    found = []
    for folder in names.folder.iterdir() if names.folder.is_dir() else ():
        if names.is_state(folder.name) and folder.is_dir():
            try:
                require_whole(folder)
                written = (folder / STATE_FILE).stat().st_mtime
                found.append((written, read_facts(folder)["current_step"], folder))
            except UserError as error:
                logger.warning("%s; it is left out", error)
    return max(found)[2] if found else None


def require_whole(folder: Path) -> None:
    """UserError where a part of a state is missing or cut off."""
    read_facts(folder)
    for name in (WEIGHTS_FILE, OPTIMIZER_FILE, *OPTIONAL_FILES):
        path = folder / name
        if not path.is_file():
            problem = None if name in OPTIONAL_FILES else "is missing"
        elif path.suffix == ".safetensors":
            problem = None if read_shapes(path, "--resume") else "is empty"
        else:
            problem = None if zipfile.is_zipfile(path) else "is cut off"
        if problem:
            raise UserError(f"--resume: {folder} is no whole state of a run: {name} {problem}")


def read_facts(folder: Path) -> dict[str, Any]:
    """What stands in a state's JSON file; kohya's scripts write epoch and step alone."""
    try:
        facts = read_json((folder / STATE_FILE).read_text(encoding="utf-8"))
        kinds = FACTS if "seed" in facts else {"current_epoch": int, "current_step": int}
        is_whole = all(isinstance(facts[name], kind) for name, kind in kinds.items())
        counters = [facts[name] for name, kind in kinds.items() if kind is int]
        counters += facts.get("stops", []) + facts.get("skipped", [])
        are_losses = all(isinstance(loss, float) for loss in facts.get("losses", []))
        if is_whole and are_losses and all(map(is_counter, counters)):
            return facts
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise UserError(f"--resume: {folder} is no whole state of a run: {STATE_FILE} is missing or broken")


def is_counter(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def read_state(folder: Path, plan: StepPlan, seed: int) -> LoopState:
    """Where a state stands; of one by kohya's scripts its step tells, and the seed is that of the options."""
    facts = read_facts(folder)
    if "seed" not in facts:
        state = state_at_step(facts["current_step"], plan, seed)
        state.epoch_finished = True
        return state
    return LoopState(
        epoch=facts["current_epoch"],
        step=facts["current_step"],
        batch=facts["batch_in_epoch"],
        seed=facts["seed"],
        epoch_finished=facts["epoch_finished"],
        stops=facts["stops"],
        losses=LossRecorder(facts["losses"]),
        skipped=SkipCount(*facts.get("skipped", [])[:2]),
        curves=Curves.of(facts.get("curves", {})),
    )


def resumed_state(folder: Path, plan: StepPlan, seed: int) -> LoopState:
    """Where training goes on; UserError where nothing is left to do."""
    state = read_state(folder, plan, seed)
    if state.step > plan.max_train_steps or (state.step == plan.max_train_steps and state.epoch_finished):
        raise UserError(
            f"--resume: the state is at step {state.step} and training ends at {plan.max_train_steps}; "
            "give a larger --max_train_epochs or --max_train_steps"
        )
    before = batches_per_epoch(read_facts(folder), plan)
    if state.epoch_finished and state.batch >= before:
        state.epoch, state.batch = state.epoch + 1, 0
    state.batch = same_place(state.batch, before, plan)
    state.epoch_finished = False
    return state


def batches_per_epoch(facts: dict[str, Any], plan: StepPlan) -> int:
    """Batches of an epoch in the run that wrote a state, as now where that is not known."""
    value = facts.get("batches_per_epoch")
    return value if is_counter(value) and value else plan.batches_per_epoch


def same_place(batch: int, before: int, plan: StepPlan) -> int:
    """The batch where the same share of an epoch is done that had `before` batches, at the begin of a step."""
    batch = min(batch * plan.batches_per_epoch // before, plan.batches_per_epoch)
    return batch if batch == plan.batches_per_epoch else batch - batch % plan.accumulation


def state_at_step(step: int, plan: StepPlan, seed: int) -> LoopState:
    """The place of a step in a run that began at the beginning."""
    epoch, step_in_epoch = divmod(step, plan.steps_per_epoch)
    return LoopState(epoch + 1, step, step_in_epoch * plan.accumulation, seed)


def made_with(options: TrainNetworkOptions, plan: StepPlan) -> dict[str, Any]:
    """What a state tells of its run, for a run that goes on from it to compare."""
    return {
        "optimizer_type": optimizer_name(options),
        "optimizer_args": options.optimizer_args,
        "network_module": network_module(options),
        "network_alpha": options.network_alpha,
        "batches_per_epoch": plan.batches_per_epoch,
    }


def check_state(options: TrainNetworkOptions, folder: Path, rules: ModuleType | None = None) -> None:
    """UserError where a state is not whole or is of another network or optimizer than the options'.

    Ranks are compared by the network's `rules`, or by those that need no torch.
    """
    require_whole(folder)
    facts, module = read_facts(folder), network_module(options)
    optimizer, made_by = optimizer_name(options), facts.get("optimizer_type")
    problems = []
    if made_by and find_spec(made_by).path != find_spec(optimizer).path:
        problems.append(f"it is of --optimizer_type {made_by}, and this run has {optimizer}")
    if options.mixed_precision == "fp16" and not (folder / SCALER_FILE).is_file():
        problems.append("it was made without --mixed_precision fp16, which this run has")
    if facts.get("network_module", module) != module:
        problems.append(f"it is of --network_module {facts['network_module']}, and this run has {module}")
    elif module.startswith("networks."):
        rules = rules or rules_without_torch(module)
        problems += layer_problems(options, read_shapes(folder / WEIGHTS_FILE, "--resume"), rules)
    alpha = facts.get("network_alpha", options.network_alpha)
    if alpha != options.network_alpha and not options.dim_from_weights:
        problems.append(f"it has alpha {alpha}, but --network_alpha is {options.network_alpha}")
    if problems:
        raise UserError(*(f"--resume: the state in {folder} does not fit this run: {problem}" for problem in problems))


def layer_problems(options: TrainNetworkOptions, shapes: Shapes, rules: ModuleType | None) -> list[str]:
    """What differs between the layers and ranks of a state and those that the options ask for."""
    problems = part_problems(options, shapes, rules)
    return problems + rank_problems(options, shapes, rules) if rules else problems


def part_problems(options: TrainNetworkOptions, shapes: Shapes, rules: ModuleType | None) -> list[str]:
    """The same of the parts of the model that they are in; the network's module may name them otherwise."""
    layers, problems = {name.partition(".")[0] for name in shapes}, []
    for prefix, (part, without) in getattr(rules, "PARTS", PARTS).items():
        count = sum(layer.startswith(prefix) for layer in layers)
        if count and getattr(options, without):
            problems.append(f"it has {counted(count, 'layer')} of the {part}, and --{without} leaves these out")
        elif not (count or getattr(options, without) or options.dim_from_weights):
            problems.append(f"it has no layers of the {part}, which this run trains; give --{without}")
    return problems


def rank_problems(options: TrainNetworkOptions, shapes: Shapes, rules: ModuleType) -> list[str]:
    """The same of ranks and convolutions, by the rules of the network's module."""
    if options.dim_from_weights:
        return []
    arguments = network_arguments(options)
    problems = convolution_problems(shapes, rules, arguments)
    if hasattr(rules, "other_ranks") and (other := rules.other_ranks(shapes, options.network_dim, arguments)):
        problems.append(f"it has {other}")
    return problems


def convolution_problems(shapes: Shapes, rules: ModuleType, arguments: dict[str, str]) -> list[str]:
    """The same of convolutions alone."""
    downs = [shape for name, shape in shapes.items() if name.endswith(".lora_down.weight") and shape]
    count = sum(1 for shape in downs if shape[2:] == (3, 3))
    if not downs or not hasattr(rules, "wants_convolutions") or bool(count) == rules.wants_convolutions(arguments):
        return []
    found, given = (counted(count, "layer"), "no conv_dim") if count else ("no layers", "conv_dim")
    return [f"it has {found} of 3x3 convolutions, and --network_args here have {given}"]


def resume_notes(options: TrainNetworkOptions, plan: StepPlan, folder: Path) -> list[str]:
    """What is not as in a run that was never interrupted."""
    facts, notes = read_facts(folder), []
    if "seed" not in facts:
        state = read_state(folder, plan, options.seed or 0)
        return [
            f"--resume: {folder} is a state of kohya's scripts, which lacks seed, place and losses: the order of "
            f"pictures and the noise follow {'--seed' if options.seed is not None else 'a seed that is drawn'}, the "
            f"place is that of step {state.step}: {counted(state.batch, 'batch', 'batches')} into epoch {state.epoch}"
        ]
    if options.seed not in (None, facts["seed"]):
        notes.append(f"--seed {options.seed} has no effect: training goes on with the state's, {facts['seed']}")
    given = [name for name in ("initial_step", "initial_epoch") if getattr(options, name) is not None]
    if resumes_newest(options):
        notes += [f"--{name} has no effect: training goes on from {folder}" for name in given]
    arguments = facts.get("optimizer_args", options.optimizer_args)
    if arguments != options.optimizer_args:
        notes.append(
            "--resume: the optimizer goes on with the settings in the state, those of "
            f"{written(arguments)}, not of {written(options.optimizer_args)}"
        )
    before = batches_per_epoch(facts, plan)
    if before != plan.batches_per_epoch:
        notes.append(
            f"--resume: an epoch had {before} batches and now has {plan.batches_per_epoch}: pictures, batch size or "
            "number of processes are others, and so is the order from here on; the same share of the epoch is left"
        )
    return notes


def written(arguments: list[str] | None) -> str:
    """Arguments of an optimizer as on the command line."""
    return " ".join(["--optimizer_args", *map(str, arguments)]) if arguments else "no --optimizer_args"
