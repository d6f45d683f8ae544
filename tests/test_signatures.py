"""What is read of optimizers and schedules in the source of their packages is what they take when they are called."""

import importlib
import inspect

import pytest
import torch

from library.errors import UserError
from library.options.groups import TrainNetworkOptions
from library.signatures import classes_of, parameters_of
from library.training.optimizer_names import SCHEDULE_FUNCTIONS, check_optimizer_name, check_schedule_name
from library.training.optimizers import OPTIMIZERS
from library.training.schedulers import SCHEDULERS, build_scheduler
from tests.test_optimizers import INSTALLED

PATHS = [
    *sorted({OPTIMIZERS[name].path for name in INSTALLED}),
    *(f"torch.optim.{name}" for name in ("Adam", "NAdam", "LBFGS")),
    *(f"torch.optim.lr_scheduler.{name}" for name in ("StepLR", "OneCycleLR", "CyclicLR")),
    *sorted({path for path, _ in SCHEDULE_FUNCTIONS.values()}),
]


def imported(path: str):
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("path", PATHS)
def test_parameters_are_those_of_the_imported_object(path):
    parameters = inspect.signature(imported(path)).parameters
    assert parameters_of(path) == {name: found.default is found.empty for name, found in parameters.items()}


def test_what_the_source_cannot_tell_is_not_guessed(tmp_path, monkeypatch):
    (tmp_path / "strange_package").mkdir()
    (tmp_path / "strange_package" / "__init__.py").write_text(
        "from .inner import Grown, Inner as Renamed\nfrom . import inner\n"
        "def takes_all(lr, **more): ...\n@print\ndef changed(lr): ...\nclass Bare: ...\n",
        encoding="utf-8",
    )
    (tmp_path / "strange_package" / "inner.py").write_text(
        "class Inner:\n    def __init__(self, lr, *, d=1): ...\nclass Grown(Inner): ...\n", encoding="utf-8"
    )
    monkeypatch.syspath_prepend(tmp_path)
    unknown = ("takes_all", "changed", "Bare", "none", "inner.none")
    assert [parameters_of(f"strange_package.{name}") for name in unknown] == [None] * len(unknown)
    assert parameters_of("no_such_package.Name") is None
    for name in ("Renamed", "Grown", "inner.Grown"):
        assert parameters_of(f"strange_package.{name}") == {"lr": True, "d": False}
    assert classes_of("strange_package") == ["Bare", "Grown", "Renamed"]


def test_all_optimizers_of_torch_are_known():
    found = set(classes_of("torch.optim"))
    assert found == {name for name in dir(torch.optim) if inspect.isclass(getattr(torch.optim, name))}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_argument_that_is_let_through_is_one_the_schedule_takes(name):
    """And those that flags fill in cannot be given a second time."""
    path, filled = SCHEDULE_FUNCTIONS[name]
    usual = {key: found.default for key, found in inspect.signature(imported(path)).parameters.items()}
    needed = {"piecewise_constant": {"step_rules": "1:5,0.1"}, "cosine_with_min_lr": {"min_lr_rate": 0.1}}.get(name, {})
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    for key in usual:
        given = [f"{argument}={value!r}" for argument, value in ({key: usual[key]} | needed).items()]
        options = TrainNetworkOptions(
            lr_scheduler=name, lr_scheduler_args=given, lr_warmup_steps=2, lr_scheduler_min_lr_ratio=0.1
        )
        if key in filled:
            with pytest.raises(UserError, match=f"--lr_scheduler_args: {key} of {name} is not given here"):
                check_schedule_name(options)
        else:
            check_schedule_name(options)
            build_scheduler(options, optimizer, OPTIMIZERS["AdamW"], 20)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"optimizer_type": "Adamm"}, "--optimizer_type Adamm is not known; did you mean Adam?"),
        ({"optimizer_type": "torch.optim.AdamX"}, "--optimizer_type torch.optim.AdamX is not known; did you mean Adam"),
        ({"optimizer_type": "qqqq"}, "--optimizer_type qqqq is not known; known names are AdamW, Lion, .*Prodigy"),
        ({"optimizer_args": ["qqqq=1"]}, "--optimizer_args: AdamW has no argument qqqq; it takes betas, eps"),
        ({"optimizer_args": ["lr=1"]}, "--optimizer_args: lr of AdamW is not given here"),
        (
            {"optimizer_type": "torch.optim.RMSprop", "optimizer_args": ["momentun=1", "alpha=0.9"]},
            "--optimizer_args: torch.optim.RMSprop has no argument momentun; did you mean momentum?",
        ),
    ],
)
def test_a_name_that_is_not_known_is_told_with_the_nearest_one(options, sentence):
    with pytest.raises(UserError, match=f"^{sentence}"):
        check_optimizer_name(TrainNetworkOptions(**options))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"lr_scheduler_type": "CosineAnealingLR"}, "--lr_scheduler_type CosineAnealingLR is not known; did you mean"),
        ({"lr_scheduler_type": "Tensor"}, "--lr_scheduler_type Tensor is not known; .*LambdaLR.*dotted path"),
        ({"lr_scheduler_type": "StepLR"}, "--lr_scheduler_args: StepLR needs step_size"),
        ({"lr_scheduler_args": ["last_epok=1"]}, "--lr_scheduler_args: constant has no argument last_epok; did you"),
        (
            {"lr_scheduler": "adafactor"},
            "--lr_scheduler adafactor goes with --optimizer_type Adafactor in its relative",
        ),
    ],
)
def test_a_schedule_that_is_not_known_is_told_too(options, sentence):
    with pytest.raises(UserError, match=f"^{sentence}"):
        check_schedule_name(TrainNetworkOptions(**options))
    check_schedule_name(TrainNetworkOptions(**options, optimizer_type="AdamWScheduleFree"))
