"""A network that is written while training goes on is that of its step; files go and appear in the same order."""

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from library.errors import CannotWrite
from library.training import meanwhile, run_files
from library.training.meanwhile import Copies, Meanwhile, Writing, write_copies, write_in_order
from library.training.resuming import MORE_FILE
from library.training.saving import STATE_FILE, LoopState
from library.training.state_files import copy_state
from tests import tiny
from train_network import train


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
def test_copies_are_the_weights_as_they_were_in_the_order_of_their_names(dtype, monkeypatch):
    monkeypatch.setattr(meanwhile, "CHUNK", 50)
    names = {"a": (3, 4), "b": (), "c": (7, 2, 1, 1), "d": (0, 4), "e": (60,)}
    weights = {name: torch.randn(shape) for name, shape in names.items()} | {"f": torch.randn(5).half()}
    copies = Copies()
    for _ in range(2):  # the second into the same place
        right = {name: value.to(dtype, copy=True) for name, value in weights.items()}
        found = copies.take(weights, dtype)
        for value in weights.values():
            value.add_(1)
        copies.wait()
        assert list(found) == list(right)
        assert all(torch.equal(found[n], right[n]) and found[n].dtype == right[n].dtype for n in right)


def test_weights_that_are_no_numbers_are_not_written(tmp_path):
    copies = Copies()
    for weight, is_whole in ((1.0, True), (1e6, False), (float("nan"), False)):
        weights = copies.take({"a": torch.tensor([weight])}, torch.float16)
        path = tmp_path / f"{weight}.safetensors"
        assert write_copies(path, copies, weights, dict) is is_whole and path.exists() is is_whole


def test_what_follows_waits_until_it_is_asked_for_and_the_next_work_for_both():
    may_go_on, told, thread = threading.Event(), [], threading.get_ident()
    work = Meanwhile()

    def then(done) -> None:
        assert threading.get_ident() == thread
        told.append(done.result())

    work.begin(may_go_on.wait, then)
    work.look()
    assert told == []
    threading.Timer(0.05, may_go_on.set).start()
    work.begin(lambda: 2, then)
    assert told == [True]
    work.finish()
    work.finish()
    assert told == [True, 2]


def test_an_error_is_raised_to_who_asks():
    work = Meanwhile()

    def fail() -> None:
        raise CannotWrite(Path("a"), "disk full")

    work.begin(fail, lambda done: done.result())
    with pytest.raises(CannotWrite, match="disk full"):
        work.finish()
    work.finish()


def saved_every_step(tiny_file, pictures, output, **more: object) -> dict[str, Path]:
    train(
        tiny.arguments(
            tiny_file, pictures, output, save_every_n_steps=2, save_last_n_steps=2,
            save_precision="fp16", learning_rate=1e-2, **more,
        )
    )  # fmt: skip
    return {path.name: path for path in sorted(output.glob("*.safetensors"))}


def contents(output: Path) -> dict[str, bytes]:
    """What is in the networks and states of a run."""
    states = sorted(path for path in output.glob("*-state/*") if path.name != STATE_FILE)
    weights = {path: load_file(path) for path in output.glob("*.safetensors")}  # their metadata has the time
    found = {
        f"{path.name}: {key}": value.numpy().tobytes() for path, file in weights.items() for key, value in file.items()
    }
    return found | {str(path.relative_to(output)): path.read_bytes() for path in states}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"optimizer_type": "RAdamScheduleFree"},
        {"save_state": True},
        {"save_state": True, "ema": True},
        {"save_state": True, "network_args": ["init=pissa"]},
    ],
    ids=["network", "schedule free", "state", "averages", "a file that is not the state"],
)
def test_a_run_with_a_slow_disk_has_the_files_of_one_that_waits(more, tiny_file, pictures, tmp_path, monkeypatch):
    if "optimizer_type" in more:
        pytest.importorskip("schedulefree")
    begin = Meanwhile.begin

    def begin_slowly(self: Meanwhile, work: Callable, then: Callable) -> None:
        begin(self, lambda: time.sleep(0.5) or work(), then)  # for some steps

    def begin_and_wait(self: Meanwhile, work: Callable, then: Callable) -> None:
        begin(self, work, then)
        self.finish()

    monkeypatch.setattr(Meanwhile, "begin", begin_slowly)
    found = saved_every_step(tiny_file, pictures, tmp_path / "out", **more)
    monkeypatch.setattr(Meanwhile, "begin", begin_and_wait)
    right = saved_every_step(tiny_file, pictures, tmp_path / "waits", **more)
    assert list(found) == list(right) and len(found) == 3
    assert contents(tmp_path / "out") == contents(tmp_path / "waits")


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_a_copied_state_is_the_folder_that_accelerate_would_have_written(kind, tmp_path):
    accelerator, model = Accelerator(cpu=True), torch.nn.Linear(5, 7)
    optimizer = kind(model.parameters(), 0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    accelerator.scaler = torch.amp.GradScaler("cpu")
    more = {"norms": torch.randn(3, 4).T, "shared": [model.weight.detach()[:2]] * 2, "name": "中文", 1: None}
    accelerator.register_for_checkpointing(SimpleNamespace(state_dict=lambda: more, load_state_dict=None))

    def step() -> None:
        model(torch.randn(2, 5)).sum().backward()
        optimizer.step()
        schedule.step()

    step()
    accelerator.save_state(tmp_path / "right")
    copied = copy_state(accelerator, LoopState(step=1))
    step()
    more["name"] = "later"
    copied.write(tmp_path / "found")
    names = {path.name for path in (tmp_path / "right").iterdir()}
    assert {path.name for path in (tmp_path / "found").iterdir()} == names | {STATE_FILE} and len(names) == 6
    for name in names - {MORE_FILE}:
        assert (tmp_path / "found" / name).read_bytes() == (tmp_path / "right" / name).read_bytes(), name
    kept = torch.load(tmp_path / "found" / MORE_FILE, weights_only=True)
    right = torch.load(tmp_path / "right" / MORE_FILE, weights_only=True)
    assert kept.keys() == right.keys() and kept["name"] == "中文" and kept[1] is None
    assert torch.equal(kept["norms"], right["norms"]) and torch.equal(kept["shared"][0], right["shared"][0])
    assert kept["shared"][0] is kept["shared"][1]


def test_a_state_follows_a_network_that_failed_but_not_one_of_no_numbers():
    full = CannotWrite(Path("network"), "disk full")

    def fail() -> None:
        raise full

    network, state = (Writing(Path(name), write, bool) for name, write in (("network", fail), ("state", bool)))
    assert write_in_order([network, Writing(Path("state"), lambda: None, bool)]) == [full, None]
    assert write_in_order([replace(network, write=lambda: False), state]) == [False]


def test_a_file_that_could_not_be_written_meanwhile_is_told_and_older_ones_stay(
    tiny_file, pictures, tmp_path, monkeypatch, capfd
):
    def without_room(path: Path, *arguments: object) -> bool:
        if path.name == "lora-step00000008.safetensors":
            raise CannotWrite(path, "no room")
        return write_copies(path, *arguments)

    monkeypatch.setattr(run_files, "write_copies", without_room)
    found = saved_every_step(tiny_file, pictures, tmp_path / "out")
    assert list(found) == ["lora-step00000004.safetensors", "lora-step00000006.safetensors", "lora.safetensors"]
    told = capfd.readouterr().err.splitlines()
    (warning,) = [line for line in told if line.endswith("training goes on, and older files stay")]
    assert "lora-step00000008.safetensors cannot be written: no room" in warning
