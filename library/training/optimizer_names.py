"""Names and arguments of optimizers and schedules, held against the source of their packages. Needs no torch."""

import difflib
import re
from collections.abc import Collection

from library.errors import UserError, quoted_list
from library.options.derived import chooses_own_rate, optimizer_name, parse_key_values, trained_rates
from library.options.groups import TrainNetworkOptions
from library.signatures import classes_of, parameters_of
from library.training.optimizers import OPTIMIZERS, UNFIT, find_spec

TORCHS_OPTIMIZERS = "torch.optim"
TORCHS_SCHEDULES = "torch.optim.lr_scheduler"
HIGH_RATE = 0.1
WARMUP = ("optimizer", "num_warmup_steps")
WHOLE = (*WARMUP, "num_training_steps")

# schedule -> the function that makes it, and those of its parameters that other flags fill in
SCHEDULE_FUNCTIONS = {
    "constant": ("transformers.optimization.get_constant_schedule", ("optimizer",)),
    "constant_with_warmup": ("transformers.optimization.get_constant_schedule_with_warmup", WARMUP),
    "linear": ("transformers.optimization.get_linear_schedule_with_warmup", WHOLE),
    "cosine": ("transformers.optimization.get_cosine_schedule_with_warmup", WHOLE),
    "cosine_with_restarts": ("transformers.optimization.get_cosine_with_hard_restarts_schedule_with_warmup", WHOLE),
    "polynomial": ("transformers.optimization.get_polynomial_decay_schedule_with_warmup", WHOLE),
    "inverse_sqrt": ("transformers.optimization.get_inverse_sqrt_schedule", WARMUP),
    "cosine_with_min_lr": (
        "transformers.optimization.get_cosine_with_min_lr_schedule_with_warmup",
        (*WHOLE, "num_cycles"),
    ),
    "warmup_stable_decay": (
        "transformers.optimization.get_wsd_schedule",
        (*WHOLE, "num_decay_steps", "num_stable_steps", "num_cycles"),
    ),
    "piecewise_constant": ("diffusers.optimization.get_piecewise_constant_schedule", ("optimizer",)),
}


def check_optimizer_name(options: TrainNetworkOptions) -> None:
    """UserError for an optimizer that there is not, or arguments it does not take, as far as sources tell."""
    name = optimizer_name(options)
    spec = find_spec(name)
    module, _, class_name = spec.path.rpartition(".")
    if module == TORCHS_OPTIMIZERS and (there := classes_of(module)) and class_name not in there:
        known = [*OPTIMIZERS, *(known for known in there if known not in (*UNFIT, "Optimizer"))]
        others = f"known names are {quoted_list(list(OPTIMIZERS), 30)}, and the dotted path of any optimizer class"
        raise UserError(f"--optimizer_type {name} is not known; {nearest(class_name, known) or others}")
    given = parse_key_values(options.optimizer_args, "optimizer_args")
    check_arguments("optimizer_args", name, spec.path, given, ("params", "lr"))


def check_schedule_name(options: TrainNetworkOptions) -> None:
    """The same of the schedule of the learning rate, where the optimizer follows one."""
    if chooses_own_rate(options):
        return
    given, class_path = parse_key_values(options.lr_scheduler_args, "lr_scheduler_args"), options.lr_scheduler_type
    if options.lr_scheduler.startswith("adafactor"):
        raise UserError(
            f"--lr_scheduler {options.lr_scheduler} goes with --optimizer_type Adafactor in its relative steps only"
        )
    if not class_path:
        path, filled = SCHEDULE_FUNCTIONS.get(options.lr_scheduler, ("", ()))
        check_arguments("lr_scheduler_args", options.lr_scheduler, path, given, filled)
        return
    if "." not in class_path:
        there = [name for name in classes_of(TORCHS_SCHEDULES) if makes_schedules(f"{TORCHS_SCHEDULES}.{name}")]
        if there and class_path not in there:
            hint = nearest(class_path, there) or f"known are {quoted_list(there, 20)}, and the dotted path of any class"
            raise UserError(f"--lr_scheduler_type {class_path} is not known; {hint}")
        class_path = f"{TORCHS_SCHEDULES}.{class_path}"
    check_arguments("lr_scheduler_args", options.lr_scheduler_type, class_path, given, ("optimizer",))


def makes_schedules(path: str) -> bool:
    """Whether a class is a schedule of torch's; the one they have in common only looks like it."""
    return "last_epoch" in (parameters_of(path) or ()) and not path.endswith(".LRScheduler")


def rate_warnings(options: TrainNetworkOptions) -> list[str]:
    """A sentence where a rate is far above what an optimizer of Adam's or Lion's kind can learn with."""
    name = optimizer_name(options)
    spec = find_spec(name)
    is_of_kind = re.match(r"(Paged|R|N)?(Adam|Lion|Adafactor)", spec.path.rpartition(".")[2])
    if not is_of_kind or spec.adapts_lr or (spec.relative_step and chooses_own_rate(options)):
        return []
    high = [rate for rate in trained_rates(options) if rate > HIGH_RATE]
    if not high:
        return []
    return [f"the learning rate {max(high):g} is far too high for {name}: 0.0001 is usual, and the loss will diverge"]


def check_arguments(flag: str, name: str, path: str, given: Collection[str], filled: Collection[str]) -> None:
    """UserError for each argument that the function at `path` has not, or lacks; `filled` are those of other flags."""
    parameters = parameters_of(path) if path else None
    if parameters is None:
        return
    free = [parameter for parameter in parameters if parameter not in filled]
    problems = []
    for key in given:
        if key in filled and key in parameters:
            problems.append(f"--{flag}: {key} of {name} is not given here, but follows from flags of its own")
        elif key not in free:
            hint = nearest(key, free) or f"it takes {quoted_list(free, 20)}"
            problems.append(f"--{flag}: {name} has no argument {key}; {hint}")
    lacking = [parameter for parameter in free if parameters[parameter] and parameter not in given]
    if lacking and not problems:
        problems.append(f"--{flag}: {name} needs {quoted_list(lacking)}")
    if problems:
        raise UserError(*problems)


def nearest(name: str, known: Collection[str]) -> str:
    """ "did you mean NAME?", whatever the case of letters; "" where nothing is near."""
    lower = {other.lower(): other for other in known}
    found = difflib.get_close_matches(name.lower(), lower, n=1)
    return f"did you mean {lower[found[0]]}?" if found else ""
