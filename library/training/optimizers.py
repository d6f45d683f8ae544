"""The optimizers by name, and how their arguments are read. Torch is imported only when one is built."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from library.errors import UserError
from library.options.derived import is_schedule_free, optimizer_name, parse_key_values
from library.options.groups import OptimizerOptions

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
    schedule_free: bool = False  # has train() and eval() modes and takes no schedule
    relative_step: bool = False  # Adafactor: chooses its own rate unless relative_step=False is given


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
    "DAdaptation": OptimizerSpec("dadaptation.experimental.DAdaptAdamPreprint", package="dadaptation", adapts_lr=True),
    "DAdaptAdamPreprint": OptimizerSpec(
        "dadaptation.experimental.DAdaptAdamPreprint", package="dadaptation", adapts_lr=True
    ),
    "DAdaptAdaGrad": OptimizerSpec("dadaptation.DAdaptAdaGrad", package="dadaptation", adapts_lr=True),
    "DAdaptAdam": OptimizerSpec("dadaptation.DAdaptAdam", package="dadaptation", adapts_lr=True),
    "DAdaptAdan": OptimizerSpec("dadaptation.DAdaptAdan", package="dadaptation", adapts_lr=True),
    "DAdaptAdanIP": OptimizerSpec("dadaptation.experimental.DAdaptAdanIP", package="dadaptation", adapts_lr=True),
    "DAdaptLion": OptimizerSpec("dadaptation.DAdaptLion", package="dadaptation", adapts_lr=True),
    "DAdaptSGD": OptimizerSpec("dadaptation.DAdaptSGD", package="dadaptation", adapts_lr=True),
    "Prodigy": OptimizerSpec("prodigyopt.Prodigy", package="prodigyopt", adapts_lr=True),
    "Adafactor": OptimizerSpec("transformers.optimization.Adafactor", relative_step=True),
    "RAdamScheduleFree": OptimizerSpec("schedulefree.RAdamScheduleFree", package="schedulefree", schedule_free=True),
    "AdamWScheduleFree": OptimizerSpec("schedulefree.AdamWScheduleFree", package="schedulefree", schedule_free=True),
    "SGDScheduleFree": OptimizerSpec("schedulefree.SGDScheduleFree", package="schedulefree", schedule_free=True),
}
ALWAYS_INSTALLED = ("torch", "transformers")


def find_spec(name: str) -> OptimizerSpec:
    """The table's row for a name in any case, a class of torch.optim, or any dotted path."""
    for known, spec in OPTIMIZERS.items():
        if known.lower() == name.lower():
            return spec
    path = name if "." in name else f"torch.optim.{name}"
    return OptimizerSpec(path, package=path.split(".")[0], schedule_free=is_schedule_free(name))


def check_optimizer(name: str) -> list[str]:
    """A sentence where the package of the optimizer is not installed."""
    package = find_spec(name).path.split(".")[0]
    is_there = package in ALWAYS_INSTALLED or importlib.util.find_spec(package) is not None
    return [] if is_there else [missing_package(name)]


def missing_package(name: str) -> str:
    spec = find_spec(name)
    package = spec.package or spec.path.split(".")[0]
    return f"--optimizer_type {name} needs the package {package}, which is not installed: pip install {package}"


def import_class(spec: OptimizerSpec, name: str) -> type[Optimizer]:
    module_name, _, class_name = spec.path.rpartition(".")
    try:
        return getattr(importlib.import_module(module_name), class_name)
    except ModuleNotFoundError as error:
        raise UserError(missing_package(name)) from error
    except (AttributeError, ValueError) as error:
        known = ", ".join(OPTIMIZERS)
        raise UserError(
            f"--optimizer_type {name}: {module_name} has no {class_name}; known names are {known}, "
            "and the dotted path of any optimizer class"
        ) from error


def adafactor_arguments(given: dict) -> dict:
    """Adafactor takes relative steps (arXiv:1804.04235, section 8) unless told otherwise; warmup_init needs them."""
    relative_step = given.get("relative_step", True) or given.get("warmup_init", False)
    return given | {"relative_step": relative_step}


def build_optimizer(options: OptimizerOptions, groups: list[dict]) -> tuple[Optimizer, OptimizerSpec, str]:
    """The optimizer over the groups, its row, and its name for metadata ("module.Class(k=v)")."""
    name = optimizer_name(options)
    spec = find_spec(name)
    optimizer_class = import_class(spec, name)
    given = parse_key_values(options.optimizer_args, "optimizer_args")
    given |= {key: value for key, value in spec.implied.items() if key not in given}
    if spec.relative_step:
        given = adafactor_arguments(given)
        spec = replace(spec, relative_step=given["relative_step"])
    not_for_optimizer = ("name", "lr") if spec.relative_step else ("name",)
    groups = [{key: value for key, value in group.items() if key not in not_for_optimizer} for group in groups]
    lr = None if spec.relative_step else options.learning_rate
    try:
        optimizer = optimizer_class(groups, lr=lr, **(spec.defaults | given))
    except (TypeError, ValueError) as error:
        raise UserError(f"--optimizer_type {name} does not take these arguments: {error}") from error
    written = f"({','.join(f'{key}={value}' for key, value in given.items())})" if given else ""
    return optimizer, spec, f"{optimizer_class.__module__}.{optimizer_class.__name__}{written}"
