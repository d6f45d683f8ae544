"""The learning rate at every step is that of kohya's scripts, curve by curve."""

import json
from pathlib import Path

import pytest
import torch
from transformers.optimization import Adafactor

from library.errors import UserError
from library.options.cli import read_options
from library.options.groups import SCHEDULERS as NAMES
from library.options.groups import TrainNetworkOptions
from library.training.optimizer_names import check_schedule_name
from library.training.optimizers import OPTIMIZERS, build_optimizer, find_spec
from library.training.schedulers import SCHEDULERS, build_scheduler, horizon

GOLDEN = json.loads((Path(__file__).parent / "data" / "lr_scheduler_golden.json").read_text(encoding="utf-8"))
CURVES = {name: row for name, row in GOLDEN.items() if "error" not in row}
REFUSED = {name: row for name, row in GOLDEN.items() if "error" in row}
NUM_STEPS = 20  # of the runs the curves were taken from
REQUIRED = ["--pretrained_model_name_or_path", "m", "--train_data_dir", "d", "--output_dir", "o", "--resolution", "64"]


def options_of(argv: list[str]) -> TrainNetworkOptions:
    return read_options(TrainNetworkOptions, [*REQUIRED, "--learning_rate", "1", *argv])


def build(argv: list[str]):
    """Schedule and optimizer, as training builds them.

    A schedule-free optimizer's package need not be installed: the schedule follows from the table's row.
    """
    options = options_of(argv)
    check_schedule_name(options)
    groups = [{"name": "unet", "params": [torch.nn.Parameter(torch.ones(2))], "lr": 1.0}]
    spec = find_spec(options.optimizer_type or "AdamW")
    if spec.schedule_free:
        optimizer = torch.optim.AdamW(groups, lr=options.learning_rate)
    else:
        optimizer, spec, _ = build_optimizer(options, groups)
    return build_scheduler(options, optimizer, spec, NUM_STEPS), optimizer


def curve(scheduler, optimizer, count: int) -> list[float]:
    """The rate at step 0, 1, ... as it is logged."""
    rates = []
    for _ in range(count):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("row", CURVES.values(), ids=CURVES)
def test_curve_is_kohyas(row):
    scheduler, optimizer = build(row["argv"])
    assert curve(scheduler, optimizer, len(row["lr_at_step"])) == pytest.approx(row["lr_at_step"], abs=2e-8)
    assert row["cls"] in (type(scheduler).__name__, "DummyScheduler")


@pytest.mark.parametrize("row", REFUSED.values(), ids=REFUSED)
def test_what_ends_kohyas_scripts_is_a_mistake_here(row):
    with pytest.raises(UserError, match="--lr_"):
        build(row["argv"])


def test_names_of_the_option_are_those_of_the_table():
    assert set(NAMES) == {*SCHEDULERS, "adafactor"}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_schedule_keeps_the_ratio_of_the_groups(name):
    needed = {
        "cosine_with_min_lr": ["--lr_scheduler_min_lr_ratio", "0.1"],
        "piecewise_constant": ["--lr_scheduler_args", "step_rules='1:5,0.1'"],
    }
    options = options_of(["--lr_scheduler", name, *needed.get(name, [])])
    groups = [{"params": [torch.nn.Parameter(torch.ones(2))], "lr": rate} for rate in (1.0, 0.5)]
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    scheduler = build_scheduler(options, optimizer, OPTIMIZERS["AdamW"], NUM_STEPS)
    for _ in range(5):
        first, second = scheduler.get_last_lr()
        assert second == pytest.approx(first / 2, abs=1e-7)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    ("argv", "lengths"),
    [
        (["--lr_warmup_steps", "4"], (20, 4, 0)),
        (["--lr_warmup_steps", "10%", "--lr_decay_steps", "50%"], (20, 2, 10)),
        (["--lr_warmup_steps", "0.99"], (20, 19, 0)),
    ],
)
def test_lengths_are_counts_or_shares_of_all_steps(argv, lengths):
    found = horizon(options_of(["--lr_scheduler", "linear", *argv]), NUM_STEPS)
    assert (found.total, found.warmup, found.decay) == lengths
    assert found.stable == found.total - found.warmup - found.decay


def test_relative_steps_of_adafactor_are_reported():
    scheduler, optimizer = build(["--optimizer_type", "Adafactor", "--lr_scheduler", "cosine"])
    assert type(optimizer) is Adafactor
    assert curve(scheduler, optimizer, 2) == [1.0, 1.0]  # nothing chosen yet
    optimizer.param_groups[0]["params"][0].grad = torch.ones(2)
    optimizer.step()
    scheduler.step()
    assert scheduler.get_last_lr()[0] == pytest.approx(0.01)  # min(1e-2, 1/sqrt(step)) times the weights' size, 1


def test_rate_before_the_first_relative_step_may_be_given():
    scheduler, _ = build(["--optimizer_type", "Adafactor", "--lr_scheduler", "adafactor:0.25"])
    assert scheduler.get_last_lr() == [0.25]


@pytest.mark.parametrize("name", ["adafactor:fast", "adafactor:", "cosine:3", "Cosine"])
def test_name_with_something_that_does_not_belong_is_a_mistake(name):
    with pytest.raises(UserError, match=f"--lr_scheduler {name} is not known"):
        options_of(["--lr_scheduler", name, "--optimizer_type", "Adafactor"])


def test_argument_the_schedule_does_not_take_is_a_mistake():
    argv = ["--lr_scheduler_type", "torch.optim.lr_scheduler.CyclicLR", "--lr_scheduler_args", "base_lr=1", "max_lr=x"]
    with pytest.raises(UserError, match="--lr_scheduler_args do not fit the schedule torch.optim.lr_scheduler.Cyclic"):
        build(argv)


@pytest.mark.parametrize(
    "argv",
    [
        ["--lr_scheduler", "piecewise_constant", "--lr_scheduler_args", "step_rules='soon:5'"],
        ["--lr_scheduler", "warmup_stable_decay", "--lr_scheduler_args", "decay_type='steep'"],
        ["--lr_scheduler", "polynomial", "--lr_scheduler_args", "lr_end=2"],
    ],
    ids=lambda argv: argv[1],
)
def test_argument_of_a_value_the_schedule_does_not_take_is_a_mistake(argv):
    with pytest.raises(UserError, match=f"--lr_scheduler_args do not fit the schedule {argv[1]}: "):
        build(argv)


def test_piecewise_schedule_says_what_it_needs():
    with pytest.raises(UserError, match="piecewise_constant needs --lr_scheduler_args"):
        build(["--lr_scheduler", "piecewise_constant"])


def test_a_schedule_that_follows_a_loss_is_a_mistake():
    with pytest.raises(UserError, match="--lr_scheduler_type ReduceLROnPlateau follows a measured loss"):
        build(["--lr_scheduler_type", "ReduceLROnPlateau"])


@pytest.mark.parametrize("name", ["NoSuchLR", "no_such_package.LR", "torch.optim.lr_scheduler.NoSuchLR"])
def test_unknown_class_is_a_mistake(name):
    with pytest.raises(UserError, match=f"--lr_scheduler_type {name}(:| is not known)"):
        build(["--lr_scheduler_type", name])
