"""A network that is written while training goes on is that of its step; files go and appear in the same order."""

import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from library.errors import CannotWrite
from library.training import meanwhile, run_files
from library.training.meanwhile import Copies, Meanwhile, write_copies
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


@pytest.mark.parametrize("more", [{}, {"optimizer_type": "RAdamScheduleFree"}])
def test_a_run_with_a_slow_disk_has_the_files_of_one_that_waits(more, tiny_file, pictures, tmp_path, monkeypatch):
    if more:
        pytest.importorskip("schedulefree")

    def slowly(*arguments: object) -> bool:
        time.sleep(0.5)  # some steps
        return write_copies(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(run_files, "write_copies", slowly)
        found = saved_every_step(tiny_file, pictures, tmp_path / "out", **more)
    right = saved_every_step(tiny_file, pictures, tmp_path / "waits", save_state=True, **more)
    assert list(found) == list(right) and len(found) == 3
    for name, path in found.items():
        weights = load_file(path)
        assert weights.keys() == load_file(right[name]).keys()
        assert all(torch.equal(value, weights[key]) for key, value in load_file(right[name]).items())


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
