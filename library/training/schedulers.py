"""The learning-rate schedules by name."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import optimization as diffusers_schedules
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import optimization as schedules

from library.errors import UserError
from library.options.derived import chooses_own_rate, parse_key_values
from library.options.groups import SchedulerOptions, TrainNetworkOptions
from library.training.optimizers import OptimizerSpec, check_call


@dataclass(frozen=True)
class Horizon:
    """The lengths a schedule is made of, in optimizer steps."""

    total: int
    warmup: int
    decay: int

    @property
    def stable(self) -> int:
        return self.total - self.warmup - self.decay


Builder = Callable[[Optimizer, Horizon, SchedulerOptions], LRScheduler]


def build_inverse_sqrt(optimizer: Optimizer, horizon: Horizon, options: SchedulerOptions, **given) -> LRScheduler:
    timescale = given.pop("timescale", options.lr_scheduler_timescale)
    return schedules.get_inverse_sqrt_schedule(optimizer, horizon.warmup, timescale=timescale, **given)


def build_min_lr_cosine(optimizer: Optimizer, horizon: Horizon, options: SchedulerOptions, **given) -> LRScheduler:
    if "min_lr" not in given and options.lr_scheduler_min_lr_ratio is None:
        raise UserError("--lr_scheduler cosine_with_min_lr needs --lr_scheduler_min_lr_ratio, e.g. 0.1")
    return schedules.get_cosine_with_min_lr_schedule_with_warmup(
        optimizer,
        horizon.warmup,
        horizon.total,
        num_cycles=options.lr_scheduler_num_cycles / 2,
        **({"min_lr_rate": options.lr_scheduler_min_lr_ratio} | given),
    )


def build_warmup_stable_decay(optimizer: Optimizer, horizon: Horizon, options: SchedulerOptions, **given):
    return schedules.get_wsd_schedule(
        optimizer,
        num_warmup_steps=horizon.warmup,
        num_decay_steps=horizon.decay,
        num_stable_steps=horizon.stable,
        num_cycles=options.lr_scheduler_num_cycles / 2,
        **({"min_lr_ratio": options.lr_scheduler_min_lr_ratio or 0.0} | given),
    )


SCHEDULERS: dict[str, Builder] = {
    "constant": lambda o, h, _, **given: schedules.get_constant_schedule(o, **given),
    "constant_with_warmup": lambda o, h, _, **given: schedules.get_constant_schedule_with_warmup(o, h.warmup, **given),
    "linear": lambda o, h, _, **given: schedules.get_linear_schedule_with_warmup(o, h.warmup, h.total, **given),
    "cosine": lambda o, h, _, **given: schedules.get_cosine_schedule_with_warmup(o, h.warmup, h.total, **given),
    "cosine_with_restarts": lambda o, h, options, **given: schedules.get_cosine_with_hard_restarts_schedule_with_warmup(
        o, h.warmup, h.total, **({"num_cycles": options.lr_scheduler_num_cycles} | given)
    ),
    "polynomial": lambda o, h, options, **given: schedules.get_polynomial_decay_schedule_with_warmup(
        o, h.warmup, h.total, **({"power": options.lr_scheduler_power} | given)
    ),
    "inverse_sqrt": build_inverse_sqrt,
    "cosine_with_min_lr": build_min_lr_cosine,
    "warmup_stable_decay": build_warmup_stable_decay,
    "piecewise_constant": lambda o, _h, _o, **given: diffusers_schedules.get_piecewise_constant_schedule(o, **given),
}


def build_adafactor_schedule(options: TrainNetworkOptions, optimizer: Optimizer) -> LRScheduler:
    """A schedule that only reports the rate Adafactor chose; before the first step it reports --learning_rate."""
    _, _, initial = options.lr_scheduler.partition(":")
    return schedules.AdafactorSchedule(optimizer, float(initial) if initial else options.learning_rate)


def horizon(options: SchedulerOptions, max_train_steps: int) -> Horizon:
    """The lengths of the schedule; shares of the whole become steps."""

    def steps(value: int | float) -> int:
        return int(value * max_train_steps) if isinstance(value, float) else value

    return Horizon(max_train_steps, steps(options.lr_warmup_steps), steps(options.lr_decay_steps))


def check_schedule(options: TrainNetworkOptions, max_train_steps: int) -> None:
    """UserError for a schedule that there is not, or arguments that it does not take, before there is an optimizer."""
    if chooses_own_rate(options):
        return
    if options.lr_scheduler_type:
        given = parse_key_values(options.lr_scheduler_args, "lr_scheduler_args")
        check_call(scheduler_class(options.lr_scheduler_type), (None,), given, refusal(options.lr_scheduler_type))
    else:  # those of the table change nothing but the optimizer they are given
        stand_in = SGD([torch.zeros(1)], lr=options.learning_rate)
        build_scheduler(options, stand_in, OptimizerSpec("torch.optim.SGD"), max_train_steps)


def build_scheduler(
    options: TrainNetworkOptions, optimizer: Optimizer, spec: OptimizerSpec, max_train_steps: int
) -> LRScheduler:
    """The schedule named by the options; optimizers that choose their own rate keep it."""
    if spec.schedule_free:
        return LambdaLR(optimizer, lambda _: 1.0)
    if spec.relative_step or options.lr_scheduler.startswith("adafactor"):
        return build_adafactor_schedule(options, optimizer)
    given = parse_key_values(options.lr_scheduler_args, "lr_scheduler_args")
    name = options.lr_scheduler_type or options.lr_scheduler
    try:
        if options.lr_scheduler_type:
            return scheduler_class(options.lr_scheduler_type)(optimizer, **given)
        lengths = horizon(options, max_train_steps)
        return SCHEDULERS[options.lr_scheduler](optimizer, lengths, options, **given)
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(f"{refusal(name)}: {error}") from error


def refusal(name: str) -> str:
    return f"--lr_scheduler_args do not fit the schedule {name}"


def scheduler_class(name: str) -> type[LRScheduler]:
    """A class of torch.optim.lr_scheduler by its name, or any class by its dotted path."""
    module_name, _, class_name = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module_name or "torch.optim.lr_scheduler"), class_name)
    except (ModuleNotFoundError, AttributeError) as error:
        raise UserError(f"--lr_scheduler_type {name}: {error}") from error
