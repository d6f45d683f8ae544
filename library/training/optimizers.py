"""The optimizers by name, and how their arguments are read. Torch is imported only when one is built."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from library.errors import UserError, quoted_list
from library.options.derived import (
    chooses_own_rate,
    is_schedule_free,
    optimizer_name,
    parse_key_values,
    takes_relative_steps,
    trained_rates,
)
from library.options.groups import OptimizerOptions, TrainNetworkOptions

if TYPE_CHECKING:
    from torch.optim import Optimizer


@dataclass(frozen=True)
class OptimizerSpec:
    """Where an optimizer's class is, and how it behaves."""

    path: str  # dotted path of the class, imported only when chosen
    defaults: dict = field(default_factory=dict)  # --optimizer_args override them
    implied: dict = field(default_factory=dict)  # the same, and written into metadata as if they had been given
    package: str = ""  # what to install when the import fails
    adapts_lr: bool = False  # D-Adaptation, Prodigy: one rate near 1, d * lr is what counts
    one_rate: bool = False  # stops where groups have different rates
    schedule_free: bool = False  # has train() and eval() modes and takes no schedule
    relative_step: bool = False  # Adafactor: chooses its own rate unless relative_step=False is given


D_ADAPT_PREPRINT = OptimizerSpec(
    "dadaptation.experimental.DAdaptAdamPreprint", package="dadaptation", adapts_lr=True, one_rate=True
)
OPTIMIZERS = {
    "AdamW": OptimizerSpec("torch.optim.AdamW"),
    "Lion": OptimizerSpec("lion_pytorch.Lion", package="lion-pytorch"),
    "AdamW8bit": OptimizerSpec("bitsandbytes.optim.AdamW8bit", package="bitsandbytes"),
    "PagedAdamW8bit": OptimizerSpec("bitsandbytes.optim.PagedAdamW8bit", package="bitsandbytes"),
    "Lion8bit": OptimizerSpec("bitsandbytes.optim.Lion8bit", package="bitsandbytes"),
    "PagedLion8bit": OptimizerSpec("bitsandbytes.optim.PagedLion8bit", package="bitsandbytes"),
    "PagedAdamW": OptimizerSpec("bitsandbytes.optim.PagedAdamW", package="bitsandbytes"),
    "PagedAdamW32bit": OptimizerSpec("bitsandbytes.optim.PagedAdamW32bit", package="bitsandbytes"),
    "SGDNesterov": OptimizerSpec("torch.optim.SGD", {"nesterov": True}, {"momentum": 0.9}),
    "SGDNesterov8bit": OptimizerSpec("bitsandbytes.optim.SGD8bit", implied={"momentum": 0.9}, package="bitsandbytes"),
    "DAdaptation": D_ADAPT_PREPRINT,
    "DAdaptAdamPreprint": D_ADAPT_PREPRINT,
    "DAdaptAdaGrad": OptimizerSpec("dadaptation.DAdaptAdaGrad", package="dadaptation", adapts_lr=True),
    "DAdaptAdam": OptimizerSpec("dadaptation.DAdaptAdam", package="dadaptation", adapts_lr=True, one_rate=True),
    "DAdaptAdan": OptimizerSpec("dadaptation.DAdaptAdan", package="dadaptation", adapts_lr=True),
    "DAdaptAdanIP": OptimizerSpec("dadaptation.experimental.DAdaptAdanIP", package="dadaptation", adapts_lr=True),
    "DAdaptLion": OptimizerSpec("dadaptation.DAdaptLion", package="dadaptation", adapts_lr=True, one_rate=True),
    "DAdaptSGD": OptimizerSpec("dadaptation.DAdaptSGD", package="dadaptation", adapts_lr=True, one_rate=True),
    "Prodigy": OptimizerSpec("prodigyopt.Prodigy", package="prodigyopt", adapts_lr=True, one_rate=True),
    "Adafactor": OptimizerSpec("transformers.optimization.Adafactor", relative_step=True),
    "RAdamScheduleFree": OptimizerSpec("schedulefree.RAdamScheduleFree", package="schedulefree", schedule_free=True),
    "AdamWScheduleFree": OptimizerSpec("schedulefree.AdamWScheduleFree", package="schedulefree", schedule_free=True),
    "SGDScheduleFree": OptimizerSpec("schedulefree.SGDScheduleFree", package="schedulefree", schedule_free=True),
}
ALWAYS_INSTALLED = ("torch", "transformers")
PIP_NAMES = {"prodigyplus": "prodigy-plus-schedule-free"}  # of packages that are imported by another name
UNFIT = {  # of torch.optim
    "SparseAdam": "takes sparse gradients only, and those of a network are dense",
    "LBFGS": "asks for the loss several times in a step, and a training step computes it once",
}
LOW_RATE = 0.1  # of optimizers that find the rate themselves and multiply it by this one, which should be near 1


def find_spec(name: str) -> OptimizerSpec:
    """The table's row for a name in any case, a class of torch.optim, or any dotted path."""
    for known, spec in OPTIMIZERS.items():
        if known.lower() == name.lower():
            return spec
    path = name if "." in name else f"torch.optim.{name}"
    return OptimizerSpec(path, package=path.split(".")[0], schedule_free=is_schedule_free(name))


def check_optimizer(options: TrainNetworkOptions) -> list[str]:
    """Problems with the optimizer: a package that is not installed, steps or rates that do not go with it."""
    name = optimizer_name(options)
    spec = find_spec(name)
    package, class_name = spec.path.split(".")[0], spec.path.rpartition(".")[2]
    if not all(part.isidentifier() for part in spec.path.split(".")):
        return [f"--optimizer_type must be a name such as AdamW, or a class with dots, package.Class, got {name!r}"]
    is_there = package in ALWAYS_INSTALLED or importlib.util.find_spec(package) is not None
    problems = [] if is_there else [missing_package(name)]
    if spec.path.startswith("torch.optim.") and class_name in UNFIT:
        problems.append(f"--optimizer_type {name} {UNFIT[class_name]}; try AdamW")
    return problems + rate_problems(spec, name, trained_rates(options))


def rate_problems(spec: OptimizerSpec, name: str, rates: list[float]) -> list[str]:
    """A sentence where an optimizer that takes one rate is given several."""
    different = sorted(set(rates))
    if not spec.one_rate or len(different) < 2:
        return []
    found = " and ".join(f"{rate:g}" for rate in different)
    return [
        f"--optimizer_type {name} takes one learning rate for all that is trained, got {found}: give --unet_lr and "
        "--text_encoder_lr the same value (or 0), without rates of blocks or LoRA+"
    ]


def optimizer_warnings(options: TrainNetworkOptions) -> list[str]:
    """A sentence for what is set and the optimizer does not heed, and for a rate that is unusual for it."""
    name = optimizer_name(options)
    spec, warnings = find_spec(name), []
    if chooses_own_rate(options):
        names = ["lr_scheduler_type", "lr_scheduler_args", "lr_warmup_steps", "lr_decay_steps"]
        names += ["unet_lr", "text_encoder_lr"] if spec.relative_step else []
        given = [option for option in names if getattr(options, option)]
        if options.lr_scheduler != "constant" and not options.lr_scheduler.startswith("adafactor"):
            given.insert(0, "lr_scheduler")
        why = "chooses its own learning rate without relative_step=False" if spec.relative_step else "needs no schedule"
        if given:
            warnings.append(f"{quoted_list([f'--{option}' for option in given])}: no effect, as {name} {why}")
    rates = trained_rates(options)
    if spec.adapts_lr and rates and max(rates) <= LOW_RATE:
        warnings.append(f"the learning rate {max(rates):g} is low for {name}, which finds the rate itself: 1 is usual")
    return warnings


def missing_package(name: str) -> str:
    spec = find_spec(name)
    package = spec.package or spec.path.split(".")[0]
    package = PIP_NAMES.get(package, package)
    return f"--optimizer_type {name} needs the package {package}, which is not installed: pip install {package}"


def import_class(spec: OptimizerSpec, name: str) -> type[Optimizer]:
    module_name, _, class_name = spec.path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except ModuleNotFoundError as error:
        if spec in OPTIMIZERS.values() or error.name == module_name.split(".")[0]:
            raise UserError(missing_package(name)) from error
        raise UserError(f"--optimizer_type {name} cannot be imported: {error}") from error
    except (AttributeError, ValueError) as error:
        known = ", ".join(OPTIMIZERS)
        raise UserError(
            f"--optimizer_type {name}: {module_name} has no {class_name}; known names are {known}, "
            "and the dotted path of any optimizer class"
        ) from error
    if not callable(found):
        raise UserError(f"--optimizer_type {name} is no optimizer class but a {type(found).__name__}")
    return found


def check_optimizer_arguments(options: OptimizerOptions) -> None:
    """UserError for an optimizer that there is not, or --optimizer_args it does not take; imports its package."""
    name = optimizer_name(options)
    spec = find_spec(name)
    given = given_arguments(options, spec)
    check_call(import_class(spec, name), ([],), {"lr": options.learning_rate} | given, refusal(name))


def check_call(function: Callable, positional: tuple, given: dict, refusal: str) -> None:
    """UserError that begins with `refusal` where a call cannot be right, by the function's signature."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # compiled classes may have none
        return
    try:
        signature.bind(*positional, **given)
    except TypeError as error:
        raise UserError(f"{refusal}: {error}") from error


def refusal(name: str) -> str:
    return f"--optimizer_type {name} does not take these --optimizer_args"


def given_arguments(options: OptimizerOptions, spec: OptimizerSpec) -> dict:
    """--optimizer_args with what the optimizer's row implies, and relative_step as it acts."""
    given = parse_key_values(options.optimizer_args, "optimizer_args")
    given |= {key: value for key, value in spec.implied.items() if key not in given}
    return given | {"relative_step": takes_relative_steps(given)} if spec.relative_step else given


def build_optimizer(options: OptimizerOptions, groups: list[dict]) -> tuple[Optimizer, OptimizerSpec, str]:
    """The optimizer over the groups, its row, and its name for metadata ("module.Class(k=v)")."""
    name = optimizer_name(options)
    spec = find_spec(name)
    optimizer_class = import_class(spec, name)
    if problems := rate_problems(spec, name, [group["lr"] for group in groups]):
        raise UserError(*problems)
    given = given_arguments(options, spec)
    if spec.relative_step:
        spec = replace(spec, relative_step=given["relative_step"])
    not_for_optimizer = ("name", "lr") if spec.relative_step else ("name",)
    groups = [{key: value for key, value in group.items() if key not in not_for_optimizer} for group in groups]
    lr = None if spec.relative_step else options.learning_rate
    try:
        optimizer = optimizer_class(groups, lr=lr, **(spec.defaults | given))
    except (TypeError, ValueError) as error:
        raise UserError(f"{refusal(name)}: {error}") from error
    written = f"({','.join(f'{key}={value}' for key, value in given.items())})" if given else ""
    return optimizer, spec, f"{optimizer_class.__module__}.{optimizer_class.__name__}{written}"
