"""Optimizers by name: those that are installed take a step, the others say what to install."""

import importlib.util
import sys
from dataclasses import replace

import bitsandbytes
import pytest
import torch
from transformers.optimization import Adafactor

from library.errors import UserError
from library.options.groups import OptimizerOptions, TrainNetworkOptions
from library.training.eight_bit import queue_steps
from library.training.optimizer_trial import try_optimizer
from library.training.optimizers import OPTIMIZERS, build_optimizer, check_optimizer, find_spec, optimizer_warnings


def module_of(name: str) -> str:
    return OPTIMIZERS[name].path.rpartition(".")[0]


INSTALLED = [name for name in OPTIMIZERS if importlib.util.find_spec(module_of(name).split(".")[0])]


def parameter() -> torch.nn.Parameter:
    """Of 8,192 numbers: 8-bit optimizers keep fewer than 4,096 in full precision."""
    torch.manual_seed(0)
    return torch.nn.Parameter(torch.randn(64, 128))


def build(name: str = "", groups: list[dict] | None = None, **options):
    options = OptimizerOptions(optimizer_type=name, **({"learning_rate": 0.01} | options))
    return build_optimizer(options, groups or [{"name": "unet", "params": [parameter()], "lr": 0.01}])


def take_step(optimizer) -> torch.Tensor:
    """How far the first parameter moved."""
    weight = optimizer.param_groups[0]["params"][0]
    before = weight.detach().clone()
    weight.grad = torch.randn_like(weight)
    if hasattr(optimizer, "train"):
        optimizer.train()
    optimizer.step()
    return weight.detach() - before


# --- the table -------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported")
@pytest.mark.parametrize("name", INSTALLED)
def test_every_installed_optimizer_takes_a_step(name):
    optimizer, spec, written = build(name)
    moved = torch.stack([take_step(optimizer) for _ in range(8)])  # RAdam stands still in its first steps
    assert moved.isfinite().all() and moved.any()
    assert f"{type(optimizer).__module__}.{type(optimizer).__name__}" == written.partition("(")[0]
    assert spec.path.rpartition(".")[2] == type(optimizer).__name__


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if OPTIMIZERS[name].package])
def test_missing_package_is_named_with_how_to_install_it(name, monkeypatch):
    monkeypatch.setitem(sys.modules, module_of(name), None)
    package = OPTIMIZERS[name].package
    with pytest.raises(UserError, match=f"--optimizer_type {name} needs the package {package}.*pip install {package}"):
        build(name)


def test_adamw_is_the_default_and_torchs_own():
    optimizer, _, written = build()
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.param_groups[0]["weight_decay"] == 0.01
    assert written == "torch.optim.adamw.AdamW"


def test_adamw8bit_is_bitsandbytes_and_keeps_8_bit_state():
    optimizer, _, _ = build("AdamW8bit")
    assert type(optimizer) is bitsandbytes.optim.AdamW8bit
    take_step(optimizer)
    (state,) = optimizer.state.values()
    assert {value.dtype for value in state.values() if torch.is_tensor(value) and value.shape == (64, 128)} == {
        torch.uint8
    }


def test_only_paged_optimizers_of_bitsandbytes_wait_after_each_parameter():
    for name, waits in (("AdamW8bit", False), ("PagedAdamW8bit", True), ("Lion8bit", False), ("AdamW", False)):
        queue_steps(build(name)[0])
        assert (bitsandbytes.optim.optimizer.sync_gpu is bitsandbytes.utils.sync_gpu) is waits


@pytest.mark.parametrize(
    ("flag", "path"), [("use_8bit_adam", "bitsandbytes.optim.AdamW8bit"), ("use_lion_optimizer", "lion_pytorch.Lion")]
)
def test_old_flags_stand_for_names(flag, path, monkeypatch):
    monkeypatch.setitem(sys.modules, path.rpartition(".")[0], None)
    with pytest.raises(UserError, match=path.partition(".")[0].replace("_", "-")):
        build(**{flag: True})


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_names_are_known_in_any_case(name):
    assert find_spec(name.lower()) is find_spec(name.upper()) is OPTIMIZERS[name]


def test_nesterov_momentum_is_0_9_unless_given():
    for name, path in (("SGDNesterov", "torch.optim.sgd.SGD"), ("SGDNesterov8bit", "bitsandbytes.optim.sgd.SGD8bit")):
        optimizer, _, written = build(name, optimizer_args=["weight_decay=0.01"])
        group = optimizer.param_groups[0]
        assert (group["momentum"] if "momentum" in group else group["betas"][0]) == 0.9
        assert written == f"{path}(weight_decay=0.01,momentum=0.9)"
    optimizer, _, written = build("SGDNesterov", optimizer_args=["momentum=0.5"])
    assert (optimizer.param_groups[0]["momentum"], optimizer.param_groups[0]["nesterov"]) == (0.5, True)
    assert written == "torch.optim.sgd.SGD(momentum=0.5)"


# --- other classes ---------------------------------------------------------------------------------------------------


def test_any_class_of_torch_optim_is_known_by_its_name():
    assert type(build("RAdam")[0]) is torch.optim.RAdam


@pytest.mark.parametrize("path", ["torch.optim.NAdam", "bitsandbytes.optim.AdEMAMix8bit"])
def test_dotted_path_is_any_class(path):
    optimizer, _, _ = build(path)
    assert type(optimizer).__name__ == path.rpartition(".")[2]
    assert take_step(optimizer).any()


def test_dotted_path_into_a_missing_package_is_a_mistake():
    with pytest.raises(UserError, match="needs the package no_such_package"):
        build("no_such_package.Adam")


def test_dotted_path_into_a_module_that_is_not_there_is_not_told_to_be_installed():
    with pytest.raises(UserError, match="--optimizer_type torch.nomod.Adam cannot be imported: .*torch.nomod"):
        build("torch.nomod.Adam")


@pytest.mark.parametrize("name", ["Adamm", "torch.optim.AdamX", "Adam8bit"])
def test_unknown_name_is_a_mistake_that_lists_the_known_ones(name):
    with pytest.raises(UserError, match=f"--optimizer_type {name}: .*known names are AdamW, .*Prodigy"):
        build(name)


def test_name_of_a_schedule_free_class_is_recognised_outside_the_table():
    assert find_spec("prodigyplus.ProdigyPlusScheduleFree").schedule_free
    assert not find_spec("torch.optim.NAdam").schedule_free


# --- arguments -------------------------------------------------------------------------------------------------------


def test_arguments_are_python_values_and_are_written_into_the_name():
    optimizer, _, written = build("AdamW", optimizer_args=["weight_decay=0.1", "betas=0.9,0.95", "amsgrad=True"])
    group = optimizer.param_groups[0]
    assert (group["weight_decay"], group["betas"], group["amsgrad"]) == (0.1, (0.9, 0.95), True)
    assert written == "torch.optim.adamw.AdamW(weight_decay=0.1,betas=(0.9, 0.95),amsgrad=True)"


@pytest.mark.parametrize("argument", ["weight_decay", "=1", "a=b=c"])
def test_argument_that_is_no_key_and_value_is_a_mistake(argument):
    with pytest.raises(UserError, match="--optimizer_args takes key=value"):
        build("AdamW", optimizer_args=[argument])


@pytest.mark.parametrize("argument", ["weight_decya=0.1", "betas=5", "weight_decay=-1", "eps=small"])
def test_argument_the_class_does_not_take_is_a_mistake(argument):
    with pytest.raises(UserError, match="--optimizer_type AdamW does not take these --optimizer_args: "):
        build("AdamW", optimizer_args=[argument])


@pytest.mark.parametrize("argument", ["betas=0.9,0.99,0.9", "weight_decay=-1"])
def test_a_value_that_only_a_step_refuses_is_a_mistake_before_there_is_a_model(argument):
    options = OptimizerOptions(optimizer_args=[argument])
    with pytest.raises(UserError, match="--optimizer_type AdamW does not take these --optimizer_args: "):
        try_optimizer(options, torch.device("cpu"))
    try_optimizer(replace(options, optimizer_args=["betas=0.9,0.99"]), torch.device("cpu"))


def test_groups_keep_their_own_rates_in_their_order_without_their_names():
    weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    groups = [
        {"name": "textencoder", "params": weights[:1], "lr": 1e-5},
        {"name": "unet", "params": weights[1:], "lr": 1e-4},
    ]
    optimizer, _, _ = build("AdamW", groups, learning_rate=1.0)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-5, 1e-4]
    assert [group["params"][0] is weight for group, weight in zip(optimizer.param_groups, weights, strict=True)]
    assert [group["name"] for group in groups] == ["textencoder", "unet"], "the given groups were changed"
    assert all("name" not in group for group in optimizer.param_groups)


# --- Adafactor -------------------------------------------------------------------------------------------------------


def test_adafactor_chooses_its_own_rate_unless_told_otherwise():
    optimizer, spec, written = build("adafactor", learning_rate=0.5)
    assert type(optimizer) is Adafactor and spec.relative_step
    assert optimizer.param_groups[0]["lr"] is None
    assert written.endswith(".Adafactor(relative_step=True)")
    assert take_step(optimizer).abs().mean() < 0.05


def test_adafactor_without_relative_step_takes_the_given_rate():
    optimizer, spec, _ = build("Adafactor", optimizer_args=["relative_step=False", "scale_parameter=False"])
    assert not spec.relative_step
    assert optimizer.param_groups[0]["lr"] == 0.01
    assert take_step(optimizer).square().mean().sqrt().item() == pytest.approx(0.01, rel=0.1)


def test_warmup_init_of_adafactor_brings_relative_steps_with_it():
    optimizer, spec, _ = build("Adafactor", optimizer_args=["relative_step=False", "warmup_init=True"])
    assert spec.relative_step and optimizer.param_groups[0]["relative_step"]


def test_building_an_adafactor_leaves_the_table_as_it_is():
    build("Adafactor", optimizer_args=["relative_step=False"])
    assert OPTIMIZERS["Adafactor"].relative_step


# --- what optimizers make of rates and schedules ---------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in INSTALLED if OPTIMIZERS[name].adapts_lr])
def test_an_optimizer_that_takes_one_rate_is_not_given_two(name):
    """The table's trait is what the class does: those without it take a step at two rates."""
    weights = [torch.nn.Parameter(torch.ones(4, 4)) for _ in range(2)]
    groups = [{"params": [weight], "lr": rate} for weight, rate in zip(weights, (1.0, 0.5), strict=True)]
    if OPTIMIZERS[name].one_rate:
        with pytest.raises(UserError, match=f"--optimizer_type {name} takes one learning rate .* got 0.5 and 1: "):
            build_optimizer(TrainNetworkOptions(optimizer_type=name), groups)
        return
    optimizer, _, _ = build_optimizer(TrainNetworkOptions(optimizer_type=name), groups)
    for weight in weights:
        weight.grad = torch.ones(4, 4)
    optimizer.step()


def test_two_rates_are_a_mistake_before_anything_is_loaded_unless_one_is_0():
    two = TrainNetworkOptions(optimizer_type="prodigy", learning_rate=1, text_encoder_lr=[0.5])
    assert "takes one learning rate" in check_optimizer(two)[0]
    assert check_optimizer(replace(two, text_encoder_lr=[0.0])) == []
    assert check_optimizer(replace(two, network_train_unet_only=True)) == []
    assert check_optimizer(replace(two, optimizer_type="AdamW")) == []


@pytest.mark.parametrize(
    ("given", "warnings"),
    [
        ({"optimizer_type": "Prodigy", "learning_rate": 1.0}, []),
        ({"optimizer_type": "Prodigy", "learning_rate": 1e-4}, ["the learning rate 0.0001 is low for Prodigy"]),
        ({"lr_scheduler": "cosine", "lr_warmup_steps": 5}, []),
        (
            {"optimizer_type": "AdamWScheduleFree", "lr_scheduler": "cosine", "lr_warmup_steps": 5},
            ["--lr_scheduler, --lr_warmup_steps: no effect, as AdamWScheduleFree"],
        ),
        ({"optimizer_type": "Adafactor", "unet_lr": 1e-3}, ["--unet_lr: no effect, as Adafactor chooses its own"]),
        ({"optimizer_type": "Adafactor", "unet_lr": 1e-3, "optimizer_args": ["relative_step=False"]}, []),
        ({"optimizer_type": "Adafactor", "lr_scheduler": "adafactor"}, []),
    ],
)
def test_rates_and_schedules_that_an_optimizer_does_not_heed_are_said(given, warnings):
    found = optimizer_warnings(TrainNetworkOptions(**given))
    assert len(found) == len(warnings) and all(map(str.startswith, found, warnings)), found
