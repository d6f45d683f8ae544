"""A run that was stopped and goes on ends in the same bits, with the same files and curves, as one that was not."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import get_constant_schedule_with_warmup

from library.errors import Stopped, UserError
from library.options.groups import SavingOptions
from library.training.network_recipe import NetworkRecipe
from library.training.optimizers import OPTIMIZERS, find_spec
from library.training.outcomes import LATE
from library.training.plan import StepPlan
from library.training.precision import build_accelerator
from library.training.resuming import newest_state, read_state, resumed_state
from library.training.run_files import RunFiles
from library.training.saving import LoopState, OutputNames, SkipCount
from tests import tiny
from tests.conftest import RUNS_SLOW_TESTS
from tests.results import curves, weights_equal
from train_network import train

ROOT = Path(__file__).parents[1]
COMMON = dict(
    max_train_epochs=2, lr_scheduler="cosine", lr_warmup_steps=2, shuffle_caption=True, flip_aug=True, keep_tokens=1,
    caption_dropout_rate=0.2,
)  # fmt: skip
UNCACHED = dict(cache_latents=False, color_aug=True, random_crop=True)
SETTINGS = {  # options, and the batch (of 16, 8 an epoch) that is computed when Ctrl-C comes
    "first batch": (dict(), 1),
    "epoch end": (dict(save_every_n_epochs=1), 8),
    "accumulation": (dict(gradient_accumulation_steps=3), 4),
    "dropouts": (
        dict(network_dropout=0.1, network_args=["rank_dropout=0.2", "module_dropout=0.2"], gradient_checkpointing=True),
        11,
    ),
    "noise": (dict(UNCACHED, noise_offset=0.1, multires_noise_iterations=3, ip_noise_gamma=0.1), 5),
    "workers": (dict(UNCACHED, max_data_loader_n_workers=2, gradient_accumulation_steps=2), 9),
    "persistent": (dict(UNCACHED, max_data_loader_n_workers=2, persistent_data_loader_workers=True), 12),
    "bf16": (dict(mixed_precision="bf16", full_bf16=True, scale_weight_norms=0.01), 6),
    "DoRA": (dict(network_module="networks.dora", network_args=["conv_dim=2"], mixed_precision="bf16"), 4),
    "LoHa": (dict(network_module="networks.loha", network_args=["rank_dropout=0.2"], scale_weight_norms=0.1), 4),
    "LoKr": (dict(network_module="networks.lokr", network_args=["conv_dim=1"], gradient_checkpointing=True), 4),
    "LoRA-FA": (dict(network_module="networks.lora_fa", network_args=["conv_dim=2"]), 6),
    "DyLoRA": (dict(network_module="networks.dylora", network_args=["unit=2"], network_dim=4), 6),
    "OFT": (dict(network_module="networks.oft", network_dim=4, network_train_unet_only=True), 6),
    "GGPO": (dict(network_args=["ggpo_sigma=0.1", "ggpo_beta=0.1"], gradient_accumulation_steps=3), 5),
    "PiSSA": (dict(network_args=["init=pissa"], train_batch_size=2), 3),
    "average": (dict(ema=True, ema_decay=0.9, save_every_n_epochs=1), 5),
    "U-Net alone": (dict(network_train_unet_only=True, train_batch_size=2, network_args=["conv_dim=2"]), 3),
}


def of_optimizer(name: str) -> dict:
    """Options of a run with this optimizer, whose state is really of 8 bits where it can be."""
    arguments = ["min_8bit_size=16"] if "8bit" in name else None
    rate = 1.0 if find_spec(name).adapts_lr else 1e-3
    warmup = 0 if name == "DAdaptSGD" else 2  # its first step divides by the learning rate
    return dict(
        optimizer_type=name, learning_rate=rate, optimizer_args=arguments, lr_warmup_steps=warmup,
        network_train_unet_only=True,
    )  # fmt: skip


OFTEN = ("AdamW8bit", "Prodigy", "AdamWScheduleFree", "DoRA")
VARIANTS = SETTINGS | {name: (of_optimizer(name), 5) for name in OPTIMIZERS}
SLOW = VARIANTS.keys() - OFTEN - {"epoch end", "accumulation", "workers", "dropouts", "average"}


@contextmanager
def ctrl_c_in_batch(number: int, sign: signal.Signals = signal.SIGINT) -> Iterator[None]:
    """The signal comes while the run computes its batch of this number."""
    backward, count = NetworkRecipe.backward, 0

    def counted(self, batch, accumulation):
        nonlocal count
        count += 1
        if count == number:
            signal.raise_signal(sign)
        return backward(self, batch, accumulation)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NetworkRecipe, "backward", counted)
        yield


def all_curves(*folders: Path) -> dict[str, list[tuple[int, float]]]:
    """The points of runs that followed each other."""
    joined: dict[str, list[tuple[int, float]]] = {}
    for folder in folders:
        for tag, points in curves(folder).items():
            joined.setdefault(tag, []).extend(points)
    return joined


@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in VARIANTS]
)
def test_a_stopped_run_goes_on_to_the_same_bits_and_curves(variant, tiny_folder, pictures, tmp_path):
    options, last_batch = VARIANTS[variant]

    def arguments(name: str, logs: str, **more) -> list[str]:
        where = dict(logging_dir=tmp_path / logs)
        return tiny.arguments(tiny_folder, pictures, tmp_path / name, **(COMMON | options | where | more))

    train(arguments("whole", "logs 1"))
    whole = tmp_path / "whole" / "lora.safetensors"
    accumulation, per_epoch = options.get("gradient_accumulation_steps", 1), 8 // options.get("train_batch_size", 1)
    steps_per_epoch = -(-per_epoch // accumulation)
    for batch in range(1, 2 * per_epoch, 2) if RUNS_SLOW_TESTS and variant in SETTINGS else [last_batch]:
        epoch, in_epoch = divmod(batch - 1, per_epoch)
        step = epoch * steps_per_epoch + in_epoch // accumulation + 1
        if step == 2 * steps_per_epoch:
            continue  # the run ends by itself
        name, logs = f"parts {batch}", f"logs {batch}"
        with ctrl_c_in_batch(batch), pytest.raises(Stopped, match=f"stopped at step {step} of .* by Ctrl-C"):
            train(arguments(name, f"{logs} a"))
        assert {path.name for path in (tmp_path / name).iterdir() if "-step" in path.name} == {
            f"lora-step{step:08d}.safetensors",
            f"lora-step{step:08d}-state",
        }
        train(arguments(name, f"{logs} b", resume="auto", seed=None))
        assert weights_equal(whole, tmp_path / name / "lora.safetensors")
        parts = all_curves(tmp_path / f"{logs} a", tmp_path / f"{logs} b")
        assert parts == all_curves(tmp_path / "logs 1")


def test_steps_that_the_host_learns_late_change_nothing(tiny_folder, pictures, tmp_path, monkeypatch):
    """As on a GPU: files, curves and states of a run whose steps are told when two more are under way."""
    options = COMMON | dict(scale_weight_norms=0.01, save_every_n_steps=3, save_state=True)

    def run(name: str, **more) -> None:
        where = dict(logging_dir=tmp_path / f"logs {name}")
        train(tiny.arguments(tiny_folder, pictures, tmp_path / name, **(options | where | more)))

    run("whole")
    monkeypatch.setitem(LATE, "cpu", 2)
    run("late")
    with ctrl_c_in_batch(11), pytest.raises(Stopped, match="stopped at step 11 of"):
        run("parts")
    run("parts", resume="auto", logging_dir=tmp_path / "logs rest")
    assert all_curves(tmp_path / "logs late") == all_curves(tmp_path / "logs whole")
    assert all_curves(tmp_path / "logs parts", tmp_path / "logs rest") == all_curves(tmp_path / "logs whole")
    for name in ("late", "parts"):
        assert weights_equal(tmp_path / "whole" / "lora.safetensors", tmp_path / name / "lora.safetensors")
        facts = [
            json.loads((tmp_path / folder / "lora-step00000012-state" / "train_state.json").read_text(encoding="utf-8"))
            for folder in ("whole", name)
        ]
        assert facts[0]["losses"] == facts[1]["losses"]


@pytest.mark.parametrize("optimizer", ["AdamW", "AdamW8bit"])
def test_the_scale_of_fp16_goes_on_where_it_was(optimizer, tiny_folder, pictures, tmp_path, monkeypatch):
    """A scaler on the CPU, for want of a GPU: it grows every third step until it is too high."""

    def with_scaler(options):
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = build_accelerator(options)
        accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126, growth_interval=3)
        return accelerator

    monkeypatch.setattr("library.recipes.network.build_accelerator", with_scaler)
    options = COMMON | dict(optimizer_type=optimizer, max_grad_norm=0.5, network_train_unet_only=True)
    train(tiny.arguments(tiny_folder, pictures, tmp_path / "whole", save_state=True, **options))
    with ctrl_c_in_batch(10), pytest.raises(Stopped):
        train(tiny.arguments(tiny_folder, pictures, tmp_path / "parts", **options))
    train(tiny.arguments(tiny_folder, pictures, tmp_path / "parts", save_state=True, resume="auto", **options))
    scales = [torch.load(tmp_path / name / "lora-state" / "scaler.pt") for name in ("whole", "parts")]
    assert scales[0] == scales[1]
    assert scales[0]["_growth_tracker"] or scales[0]["scale"] != 2.0**126  # it has moved
    assert weights_equal(*(tmp_path / name / "lora.safetensors" for name in ("whole", "parts")))


def test_after_a_stop_the_same_files_are_left_as_without(tiny_folder, pictures, tmp_path):
    """Also those that a run had not come to remove: here step 2, which goes when step 6 is there."""
    keep = dict(
        save_every_n_steps=2, save_last_n_steps=2, save_last_n_steps_state=4, save_every_n_epochs=1,
        save_last_n_epochs=1, save_state=True, **COMMON | dict(max_train_epochs=3),
    )  # fmt: skip
    train(tiny.arguments(tiny_folder, pictures, tmp_path / "whole", **keep))
    output = tmp_path / "parts"
    with ctrl_c_in_batch(7), pytest.raises(Stopped):
        train(tiny.arguments(tiny_folder, pictures, output, **keep))
    (output / "lora-step00000002.safetensors").touch()
    (output / "lora-step00000006.safetensors").touch()
    with ctrl_c_in_batch(9), pytest.raises(Stopped):
        train(tiny.arguments(tiny_folder, pictures, output, resume="auto", **keep))
    assert not (output / "lora-step00000002.safetensors").exists()
    train(tiny.arguments(tiny_folder, pictures, output, resume="auto", **keep))
    names = [sorted(path.name for path in folder.iterdir()) for folder in (tmp_path / "whole", output)]
    assert names[0] == names[1]
    assert weights_equal(tmp_path / "whole" / "lora.safetensors", output / "lora.safetensors")


def test_a_state_of_an_epochs_last_step_is_followed_by_what_ends_the_epoch(tiny_folder, pictures, tmp_path):
    """A run that was killed after its last step and before its last save lacks nothing when it goes on."""
    common = dict(save_every_n_steps=4, save_every_n_epochs=1, save_state=True, max_train_epochs=2)
    train(tiny.arguments(tiny_folder, pictures, tmp_path / "whole", **common))
    for step, lost in ((8, ("lora-000001.safetensors", "lora.safetensors")), (16, ("lora.safetensors",))):
        resume = tmp_path / "whole" / f"lora-step{step:08d}-state"
        train(tiny.arguments(tiny_folder, pictures, tmp_path / f"{step}", resume=resume, **common))
        for name in lost:
            assert weights_equal(tmp_path / "whole" / name, tmp_path / f"{step}" / name)


class Counting(torch.optim.SGD):
    """Keeps something beside what it keeps for parameters, as torch allows."""

    def step(self, closure=None):
        self.state["steps"] = self.state.get("steps", 0) + 1
        return super().step(closure)


def test_an_optimizer_of_ones_own_that_keeps_more_than_parameters_need_goes_on(tiny_folder, pictures, tmp_path):
    options = dict(optimizer_type="tests.test_resuming.Counting", optimizer_args=["momentum=0.9"], save_state=True)
    train(tiny.arguments(tiny_folder, pictures, tmp_path / "whole", save_every_n_steps=3, **options))
    resume = tmp_path / "whole" / "lora-step00000003-state"
    train(tiny.arguments(tiny_folder, pictures, tmp_path / "parts", resume=resume, **options))
    states = [torch.load(tmp_path / name / "lora-state" / "optimizer.bin") for name in ("whole", "parts")]
    assert [state["state"]["steps"] for state in states] == [8, 8]
    assert weights_equal(*(tmp_path / name / "lora.safetensors" for name in ("whole", "parts")))


@pytest.fixture(scope="module")
def finished(tiny_folder, tmp_path_factory) -> tuple[Path, Path]:
    """The pictures and the output of a run of 7 steps with states of steps 3, 6 and 7."""
    folder = tmp_path_factory.mktemp("finished")
    pictures, output = tiny.write_pictures(folder / "train"), folder / "输出 a[1]"
    options = dict(save_every_n_steps=3, save_state=True, resume="auto", max_train_epochs=None, max_train_steps=7)
    train(tiny.arguments(tiny_folder, pictures, output, **options))
    return pictures, output


def test_auto_takes_the_newest_whole_state(finished, tmp_path, caplog):
    output = tmp_path / "copy"
    shutil.copytree(finished[1], output)
    names = OutputNames(SavingOptions(output_dir=str(output), output_name="lora"))
    (output / ".lora-step00000009-state-unfinished").mkdir()
    (output / "lora-step00000008-state").mkdir()
    (output / "other-step00000099-state").mkdir()
    assert newest_state(names) == output / "lora-state"
    assert "lora-step00000008-state is no whole state of a run: train_state.json is missing" in caplog.text
    for step in (3, 6):
        os.utime(output / f"lora-step0000000{step}-state" / "train_state.json", (1, 1))
    for step in (6, 7):
        shutil.copytree(output / "lora-step00000006-state", output / f"lora-00000{step}-state")
        os.utime(output / f"lora-00000{step}-state" / "train_state.json", (step, step))
    shutil.rmtree(output / "lora-state")
    assert newest_state(names) == output / "lora-000007-state"
    for folder, name in (("lora-000007-state", "optimizer.bin"), ("lora-000006-state", "model.safetensors")):
        os.truncate(output / folder / name, (output / folder / name).stat().st_size - 10)
    (output / "lora-step00000006-state" / "model.safetensors").unlink()
    assert newest_state(names) == output / "lora-step00000003-state"
    again = shutil.copytree(output / "lora-step00000003-state", output / "lora-step00000001-state")
    facts = json.loads((again / "train_state.json").read_text(encoding="utf-8")) | {"current_step": 1}
    (again / "train_state.json").write_text(json.dumps(facts), encoding="utf-8")
    assert newest_state(names) == again  # a run of the same name that was begun anew
    shutil.rmtree(again)
    shutil.rmtree(output / "lora-step00000003-state")
    assert newest_state(names) is None
    assert newest_state(OutputNames(SavingOptions(output_dir=str(tmp_path / "none")))) is None


def test_states_of_a_run_without_a_name_are_its_own():
    names = OutputNames(SavingOptions(output_dir="out"))
    mine = [names.state_of(path).name for path in (names.epoch(3), names.step(12), names.final())]
    assert all(names.is_state(name) for name in mine)
    assert not any(names.is_state(name) for name in ("lora-state", "at-state", "last-000001-state", ".last-state"))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"network_dim": 8}, "it has rank 4, but --network_dim is 8; give --network_dim 4"),
        ({"network_train_unet_only": True}, "18 layers of the text encoder, and --network_train_unet_only leaves "),
        ({"network_args": ["conv_dim=2"]}, "it has no layers of 3x3 convolutions, and --network_args here have conv"),
        ({"network_alpha": 3}, "it has alpha 1, but --network_alpha is 3.0"),
        ({"optimizer_type": "Lion"}, "it is of --optimizer_type AdamW, and this run has Lion"),
        ({"optimizer_args": ["amsgrad=True"], "network_args": ["loraplus_lr_ratio=4"]}, "groups of "),
        ({"max_train_steps": 7}, "the state is at step 7 and training ends at 7"),
    ],
)
def test_a_state_that_does_not_fit_is_a_mistake(given, sentence, finished, tiny_folder, tmp_path):
    pictures, output = finished
    options = dict(resume=output / "lora-state", max_train_epochs=None, max_train_steps=9) | given
    with pytest.raises(UserError, match=sentence):
        train(tiny.arguments(tiny_folder, pictures, tmp_path / "out", **options))


def test_a_state_of_other_alphas_is_a_mistake_also_where_it_does_not_tell_its_options(finished, tiny_folder, tmp_path):
    pictures, output = finished
    state = shutil.copytree(output / "lora-state", tmp_path / "state")
    facts = json.loads((state / "train_state.json").read_text())
    del facts["network_alpha"]
    (state / "train_state.json").write_text(json.dumps(facts))
    options = dict(resume=state, max_train_epochs=None, max_train_steps=9, network_alpha=3)
    with pytest.raises(UserError, match=r"does not fit this run: lora_\S+\.alpha is 1, and this run's is 3"):
        train(tiny.arguments(tiny_folder, pictures, tmp_path / "out", **options))


def test_what_a_state_decides_is_said(finished, tiny_folder, tmp_path, capsys):
    pictures, output = finished
    options = dict(resume=output / "lora-state", max_train_epochs=None, max_train_steps=8, train_batch_size=2, seed=5)
    options["optimizer_args"] = ["weight_decay=0.5", "betas=0.5,0.6"]
    train(tiny.arguments(tiny_folder, pictures, tmp_path / "out", **options))
    said = capsys.readouterr().err
    assert "--seed 5 has no effect: training goes on with the state's, 1" in said
    settings = "those of no --optimizer_args, not of --optimizer_args weight_decay=0.5 betas=0.5,0.6"
    assert f"--resume: the optimizer goes on with the settings in the state, {settings}" in said
    assert "--resume: an epoch had 8 batches and now has 4: pictures, batch size or number of processes are" in said


@pytest.mark.parametrize(
    ("facts", "batches_per_epoch", "accumulation", "place"),
    [
        (dict(current_epoch=2, batch_in_epoch=6), 8, 1, (2, 6)),
        (dict(current_epoch=2, batch_in_epoch=6), 16, 1, (2, 12)),
        (dict(current_epoch=2, batch_in_epoch=6), 4, 1, (2, 3)),
        (dict(current_epoch=2, batch_in_epoch=6), 8, 4, (2, 4)),
        (dict(current_epoch=2, batch_in_epoch=8), 5, 2, (2, 5)),
        (dict(current_epoch=2, batch_in_epoch=8, epoch_finished=True), 16, 1, (3, 0)),
        (dict(current_epoch=2, batch_in_epoch=6, epoch_finished=True), 4, 1, (2, 3)),
    ],
)
def test_where_batches_are_others_the_same_share_of_the_epoch_is_left(
    facts, batches_per_epoch, accumulation, place, tmp_path
):
    """As with another number of processes; the epoch here had 8 batches."""
    known = LoopState(step=14, seed=1).facts() | {"batches_per_epoch": 8} | facts
    (tmp_path / "train_state.json").write_text(json.dumps(known))
    plan = StepPlan(64, batches_per_epoch, 1, accumulation, num_epochs=9, max_train_steps=99)
    state = resumed_state(tmp_path, plan, seed=2)
    assert (state.epoch, state.batch, state.step, state.epoch_finished) == (*place, 14, False)


# --- states of kohya's scripts ---------------------------------------------------------------------------------------


class KohyaLora(torch.nn.Module):
    """What one layer has in kohya's networks."""

    def __init__(self, down: list[int], up: list[int]):
        super().__init__()
        self.register_buffer("alpha", torch.tensor(1))
        self.lora_down, self.lora_up = torch.nn.Module(), torch.nn.Module()
        self.lora_down.weight = torch.nn.Parameter(torch.randn(down))
        self.lora_up.weight = torch.nn.Parameter(torch.randn(up))


def write_kohya_state(folder: Path, shapes: dict[str, list[int]], steps: int) -> dict[str, dict[str, torch.Tensor]]:
    """A state as kohya's script has accelerate write it; returns weights and moments by the parameters' names."""
    torch.manual_seed(3)
    network = torch.nn.Module()
    for layer in dict.fromkeys(name.partition(".")[0] for name in shapes):
        sides = [shapes[f"{layer}.lora_{side}.weight"] for side in ("down", "up")]
        network.add_module(layer, KohyaLora(*sides))
    named = dict(network.named_parameters())
    parts = [[value for name, value in named.items() if name.startswith(part)] for part in ("lora_te", "lora_unet")]
    optimizer = torch.optim.AdamW([{"params": part, "lr": 1e-3} for part in parts], lr=1e-3)
    schedule = get_constant_schedule_with_warmup(optimizer, 10)
    accelerator = Accelerator(cpu=True)
    network, optimizer, schedule = accelerator.prepare(network, optimizer, schedule)
    for _ in range(steps):
        for parameter in network.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        schedule.step()
    accelerator.save_state(str(folder))
    (folder / "train_state.json").write_text(json.dumps({"current_epoch": 1, "current_step": steps}))
    return {"weights": named, "moments": {name: optimizer.state[value]["exp_avg"] for name, value in named.items()}}


@pytest.mark.parametrize(("kind", "keys"), [("tiny_file", "sd15_default"), ("tiny_sd2_file", "sd21_default")])
def test_a_state_of_kohyas_script_goes_on_here(kind, keys, request, pictures, tmp_path, capsys):
    """The names and their order are those of a file that kohya's script wrote, as far as the toy has the layers."""
    model = request.getfixturevalue(kind)
    options = dict(max_train_epochs=None, lr_scheduler="constant_with_warmup", lr_warmup_steps=10)
    train(tiny.arguments(model, pictures, tmp_path / "first", max_train_steps=1, **options))
    ours = {name: list(value.shape) for name, value in load_file(tmp_path / "first" / "lora.safetensors").items()}
    golden = json.loads(gzip.decompress((ROOT / "tests/data/keys" / f"{keys}.json.gz").read_bytes()))
    assert ours.keys() <= golden.keys()
    shapes = {
        name: ours[name] + [1, 1] * (len(shape) - len(ours[name]) > 1) for name, shape in golden.items() if name in ours
    }
    wanted = write_kohya_state(tmp_path / "kohya-state", shapes, steps=5)
    AcceleratorState._reset_state(reset_partial_state=True)

    found = {}

    def look(recipe: NetworkRecipe, state) -> None:
        named = dict(recipe.network.named_parameters())
        found["weights"] = {name: value.detach().clone() for name, value in named.items()}
        found["moments"] = {name: recipe.optimizer.state[value]["exp_avg"].clone() for name, value in named.items()}

    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NetworkRecipe, "sample_at_first", look)
        logs, resume = tmp_path / "logs", tmp_path / "kohya-state"
        given = dict(resume=resume, logging_dir=logs, save_state=True, max_train_steps=10, skip_until_initial_step=True)
        train(tiny.arguments(model, pictures, tmp_path / "out", **given, **options))
    for what, tensors in wanted.items():
        assert tensors.keys() == found[what].keys()
        assert all(torch.equal(found[what][name].flatten(), value.flatten()) for name, value in tensors.items())
    said = capsys.readouterr().err
    assert said.count("is a state of kohya's scripts") == 1 and "5 batches into epoch 1" in said
    assert curves(logs)["lr/unet"] == [(step, pytest.approx(step * 1e-4)) for step in range(6, 11)]
    facts = json.loads((tmp_path / "out" / "lora-state" / "train_state.json").read_text())
    assert [facts[name] for name in ("current_epoch", "current_step", "batch_in_epoch", "seed")] == [2, 10, 2, 1]


# --- requests to stop ------------------------------------------------------------------------------------------------


def test_sigterm_and_a_stop_file_stop_a_run_and_an_old_file_does_not(tiny_folder, pictures, tmp_path, capsys):
    output = tmp_path / "out"
    output.mkdir()
    (output / "STOP").touch()
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with ctrl_c_in_batch(3, signal.SIGTERM), pytest.raises(Stopped, match="stopped at step 3 of 8 by SIGTERM"):
        train(tiny.arguments(tiny_folder, pictures, output))
    assert "STOP was there before this run began, and was removed" in capsys.readouterr().err

    def leave_file(recipe: NetworkRecipe, taken: bool) -> None:
        (output / "STOP.txt").touch()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NetworkRecipe, "weights_updated", leave_file)
        with pytest.raises(Stopped, match=r"stopped at step 4 of 8 by the file .*STOP\.txt"):
            train(tiny.arguments(tiny_folder, pictures, output, resume="auto"))
    assert not (output / "STOP.txt").exists()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_second_ctrl_c_ends_at_once(tiny_folder, pictures, tmp_path):
    with ctrl_c_in_batch(2), pytest.MonkeyPatch.context() as patch:
        patch.setattr(NetworkRecipe, "stop", lambda *_: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            train(tiny.arguments(tiny_folder, pictures, tmp_path / "out"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["lora-run.json"]


def test_ctrl_c_while_the_last_file_is_written_waits_for_it(tiny_folder, pictures, tmp_path, capfd):
    write = RunFiles.write_network

    def interrupted(self, path: Path, *more) -> None:
        if path.name == "lora.safetensors":
            signal.raise_signal(signal.SIGTERM)
        write(self, path, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFiles, "write_network", interrupted)
        train(tiny.arguments(tiny_folder, pictures, tmp_path / "out", save_state_on_train_end=True))
    assert newest_state(OutputNames(SavingOptions(output_dir=str(tmp_path / "out"), output_name="lora")))
    assert json.loads((tmp_path / "out" / "lora-run.json").read_text())["outcome"] == "finished"
    assert "stopping: this step is finished and saved, as SIGTERM asks\n" in capfd.readouterr().err


@pytest.mark.skipif(os.name != "posix", reason="permissions as POSIX has them")
def test_all_files_of_a_state_have_the_permissions_of_other_files(finished):
    modes = {path.stat().st_mode for path in (finished[1] / "lora-state").iterdir()}
    assert modes == {(finished[1] / "lora-run.json").stat().st_mode}


def test_skipped_steps_are_counted_on_and_older_states_have_none(tmp_path):
    plan = StepPlan(4, 4, 1, 1, num_epochs=2, max_train_steps=8)
    facts = LoopState(step=4, skipped=SkipCount(2, 3)).facts()
    for written, count in ((facts, SkipCount(2, 3)), ({k: v for k, v in facts.items() if k != "skipped"}, SkipCount())):
        (tmp_path / "train_state.json").write_text(json.dumps(written), encoding="utf-8")
        assert read_state(tmp_path, plan, 0).skipped == count


@pytest.mark.skipif(sys.platform == "win32", reason="sends signals to a process group")
@pytest.mark.parametrize(
    ("cause", "code"),
    [
        ("ctrl-c", 3),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("term", 3), ("file", 3), ("twice", 130))),
    ],
)
def test_a_process_that_is_asked_to_stop_saves_and_tells_how_to_go_on(cause, code, tiny_file, pictures, tmp_path):
    """A terminal sends Ctrl-C to all processes in the foreground, so to workers that load pictures as well."""
    output = tmp_path / "输出"
    options = dict(
        UNCACHED, max_train_epochs=None, max_train_steps=10, save_every_n_steps=2, gradient_accumulation_steps=4,
        max_data_loader_n_workers=2, persistent_data_loader_workers=True, shuffle_caption=True,
    )  # fmt: skip
    words = [sys.executable, "train_network.py", *tiny.arguments(tiny_file, pictures, output, **options)]
    with open(tmp_path / "said.txt", "wb") as said:
        run = subprocess.Popen(words, cwd=ROOT, stdout=said, stderr=said, start_new_session=True)
    while not (output / "lora-step00000002.safetensors").exists():
        assert run.poll() is None, (tmp_path / "said.txt").read_text(encoding="utf-8")[-2000:]
        time.sleep(0.02)
    if cause == "file":
        (output / "STOP").touch()
    else:
        os.killpg(run.pid, signal.SIGTERM if cause == "term" else signal.SIGINT)
    if cause == "twice":
        while "Ctrl-C once more" not in (tmp_path / "said.txt").read_text(encoding="utf-8"):
            time.sleep(0.01)
        os.killpg(run.pid, signal.SIGINT)
    assert run.wait(120) == code
    text = (tmp_path / "said.txt").read_text(encoding="utf-8")
    if cause == "twice":
        assert "stopped by Ctrl-C" in text and not list(output.glob("*-state"))
        return
    assert "Traceback" not in text, text[-3000:]
    assert not (output / "STOP").exists()
    assert "to go on, give the same command with --resume auto" in text.splitlines()[-1]
    train(tiny.arguments(tiny_file, pictures, output, resume="auto", **options))
    train(tiny.arguments(tiny_file, pictures, tmp_path / "whole", **options))
    assert weights_equal(output / "lora.safetensors", tmp_path / "whole" / "lora.safetensors")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="gloo over torchrun is for Linux and macOS")
def test_two_processes_stop_at_the_same_step_and_go_on(tiny_file, pictures, tmp_path):
    """The first process alone looks for the file; both end after the same step."""
    options = dict(max_train_epochs=None, max_train_steps=40, save_every_n_steps=5, flip_aug=True)
    launch = ["--quiet", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--dynamo_backend", "no"]
    launch += ["--main_process_port", "0"]  # one that is free
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}

    def start(name: str, **more) -> subprocess.Popen:
        arguments = tiny.arguments(tiny_file, pictures, tmp_path / name, **options, **more)
        words = [*launch, "--mixed_precision", "no", "train_network.py", *arguments]
        command = [sys.executable, "-m", "accelerate.commands.launch", *words]
        return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, encoding="utf-8")

    run = start("parts")
    while not (tmp_path / "parts" / "lora-step00000005.safetensors").exists():
        assert run.poll() is None, run.stderr.read()[-3000:]
        time.sleep(0.05)
    (tmp_path / "parts" / "STOP").touch()
    _, said = run.communicate(timeout=300)
    assert run.returncode == 1 and "by the file" in said and "exitcode  : 3" in said, said[-3000:]
    for name in ("parts", "whole"):
        run = start(name, resume="auto")
        _, said = run.communicate(timeout=600)
        assert run.returncode == 0, said[-3000:]
    assert weights_equal(*(tmp_path / name / "lora.safetensors" for name in ("parts", "whole")))


@pytest.mark.skipif(sys.platform == "win32", reason="sends a signal to a process")
def test_ctrl_c_before_training_ends_at_once_and_leaves_nothing(tiny_file, pictures, tmp_path):
    words = [sys.executable, "train_network.py", *tiny.arguments(tiny_file, pictures, tmp_path / "out")]
    run = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE)
    said = b""
    while b"caching latents" not in said:
        assert (piece := os.read(run.stderr.fileno(), 1000)), said.decode()
        said += piece
    run.send_signal(signal.SIGINT)
    rest = run.stderr.read().decode()
    assert run.wait(60) == 130 and rest.splitlines()[-1] == "stopped by Ctrl-C"
    assert not (tmp_path / "out").exists()
