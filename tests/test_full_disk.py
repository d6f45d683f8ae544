"""Writing where there is no room: what was there stays, nothing unfinished does, and a sentence says what is needed."""

import errno
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file

from library import folders, preflight
from library.dataset.cache import CachedLatents, read_latents, write_latents
from library.dataset.info_cache import write_info
from library.dataset.packed_latents import PackedLatents
from library.dataset.text_cache import KEYS, TextOrigin, read_text, write_text
from library.errors import CannotWrite, UserError, run_script
from library.files import temporary_beside, write_text_whole
from library.leftovers import remove_leftovers
from library.logs import start_logging
from library.network_files import read_weights, write_weights
from library.options.config_file import write_config
from library.options.fields import flags_of
from library.options.groups import LoggingOptions, TrainNetworkOptions
from library.pictures import write_picture
from library.training.resuming import read_facts
from library.training.run_files import RunFiles
from library.training.saving import LoopState
from library.training.state_files import copy_state
from tests import tiny
from train_network import train

MEGABYTE = 2**20
SIDE = 600  # a network of 1.4 MB, a picture of 1.1 MB


# --- two kinds of no room --------------------------------------------------------------------------------------------


@contextmanager
def small_disk(folder: Path, num_bytes: int) -> Iterator[Path]:
    folder.mkdir(exist_ok=True)
    mounted = sys.platform == "linux" and not subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder)], capture_output=True
    ).returncode  # fmt: skip
    if not mounted:
        pytest.skip("a file system cannot be mounted here: this needs Linux and root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextmanager
def small_files(folder: Path, num_bytes: int) -> Iterator[Path]:
    """No file may become larger; the error is another, EFBIG, and needs no root."""
    resource = pytest.importorskip("resource", reason="limits are POSIX's")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield folder
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


LIMITS = {"full disk": small_disk, "limit of a file": small_files}


@pytest.fixture(params=LIMITS)
def no_room(request, tmp_path) -> Iterator[Path]:
    """A folder in which less than a megabyte can be written."""
    folder = tmp_path / "small 小"
    folder.mkdir()
    with LIMITS[request.param](folder, MEGABYTE):
        yield folder


# --- every kind of write ---------------------------------------------------------------------------------------------


def write_network(path: Path, side: int) -> None:
    write_weights(path, {"a": torch.ones(side, side)}, None, {})


def write_state(path: Path, side: int) -> None:
    accelerator, model = Accelerator(cpu=True), torch.nn.Linear(side, side)
    accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    copy_state(accelerator, LoopState(step=side)).write(path)


def write_one_latents(path: Path, side: int) -> None:
    array = np.ones((4, side // 2, side // 2), np.float32)
    write_latents(path, CachedLatents(array, (side, side), (0, 0, side, side)))


def write_one_text(path: Path, side: int) -> None:
    write_text(path, {key: np.ones((side, side), np.float32) for key in KEYS}, TextOrigin("x", np.zeros(1)))


def write_noise(path: Path, side: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    write_picture(path, Image.fromarray(pixels))


def write_options(path: Path, side: int) -> None:
    path.unlink(missing_ok=True)
    options = TrainNetworkOptions(network_args=["x" * side * side * 4])
    write_config(options, flags_of(TrainNetworkOptions), path)


def state_of(path: Path) -> int:
    load_file(path / "model.safetensors")
    torch.load(path / "optimizer.bin", weights_only=True)
    return read_facts(path)["current_step"]


KINDS: dict[str, tuple[Callable, Callable]] = {
    "a.safetensors": (write_network, read_weights),
    "a.pt": (write_network, read_weights),
    "a-state": (write_state, state_of),
    "a.npz": (write_one_latents, read_latents),
    "a_te_outputs.npz": (write_one_text, read_text),
    "a.png": (write_noise, lambda path: Image.open(path).load()),
}


@pytest.mark.parametrize("name", KINDS)
def test_what_was_there_stays_and_the_sentence_says_what_is_needed(name, no_room):
    write, read = KINDS[name]
    path = no_room / name
    write(path, 20)
    with pytest.raises((CannotWrite, UserError)) as caught:
        write(path, SIDE)
    assert re.search(rf"{re.escape(name)}.*: .* \([1-9]\.\d\d MB needed, \d+\.\d\d MB free\)", str(caught.value))
    assert [entry.name for entry in no_room.iterdir()] == [name]
    read(path)
    assert name != "a-state" or read(path) == 20
    write(path, 30)


def test_what_is_in_a_pack_stays_where_more_has_no_room(no_room):
    files, sides = PackedLatents("sd"), {"a": 20, "b": SIDE, "c": 20}
    for name, side in sides.items():
        array = np.full((4, side, side), side, np.float32)
        cached = CachedLatents(array, (side, side), (0, 0, side, side))
        if side < SIDE:
            files.write(str(no_room / name), cached, None)
            continue
        with pytest.raises(UserError, match=r"\.pack: .* \(5\.76 MB needed, .* free\); --cache_latents alone"):
            files.write(str(no_room / name), cached, None)
    files.finish()
    assert [files.has(str(no_room / name)) for name in sides] == [True, False, True]
    assert all(files.read(str(no_room / name)).latents.max() == 20 for name in "ac")
    assert len(list(no_room.iterdir())) == 1


def test_a_pack_that_cannot_be_written_anew_for_lack_of_room_stays(no_room):
    """Five latents fit on the disk, and six do not."""
    files = PackedLatents("sd")
    for names in ("abc", "bc"):  # of the first pack only a is of use in the end
        for name in names:
            array = np.full((4, 110, 110), ord(name), np.float32)
            files.write(str(no_room / name), CachedLatents(array, (880, 880), (0, 0, 880, 880)), None)
        files.finish()
    files.tidy([str(no_room)])
    assert [int(files.read(str(no_room / name)).latents.max()) for name in "abc"] == list(b"abc")
    assert len(list(no_room.iterdir())) == 2


def test_a_config_that_has_no_room_is_not_there(no_room):
    with pytest.raises(UserError, match=r"--output_config: .*x\.toml cannot be written: .* \(1\.44 MB needed"):
        write_options(no_room / "x.toml", SIDE)
    assert not list(no_room.iterdir())


def test_an_info_cache_without_room_is_a_note(no_room):
    (note,) = write_info(no_room, [(str(no_room / "a.png"), "x" * 2 * MEGABYTE, (1, 1))])
    assert re.search(r"metadata_cache\.json cannot be written: .* \(2\.10 MB needed", note)
    assert not list(no_room.iterdir())


def test_a_log_without_room_goes_on_in_the_console(no_room, capfd):
    start_logging(LoggingOptions(console_log_file=str(no_room / "run.log")))
    for number in range(300):
        logging.info("line %d %s", number, "x" * 5000)
    console = capfd.readouterr().err
    assert console.count("--console_log_file") == 1 and "Traceback" not in console
    text = (no_room / "run.log").read_text() + console
    assert set(re.findall(r"line (\d+) x{5000}$", text, re.MULTILINE)) == {str(number) for number in range(300)}
    logging.basicConfig(force=True)


# --- whole runs ------------------------------------------------------------------------------------------------------


def test_a_run_without_room_goes_on_and_its_network_is_not_lost(tiny_file, pictures, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(folders, "MIN_FREE_BYTES", 0)
    monkeypatch.setattr(preflight, "check_disk_space", lambda needs: [])  # which would say so before
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 1 --d 7\n", encoding="utf-8")
    with small_disk(tmp_path / "out", MEGABYTE) as output:
        arguments = tiny.arguments(
            tiny_file, pictures, output, save_every_n_steps=2, save_state=True, save_precision="float",
            sample_prompts=prompts, sample_every_n_steps=2,
        )  # fmt: skip
        with pytest.raises(SystemExit) as ended:
            run_script(lambda: train(arguments))
        assert ended.value.code == 2
        messages = capfd.readouterr().err
        (found,) = re.findall(
            r"^error: .*lora\.safetensors cannot be written: .*; the trained network is in (.*)$",
            messages, re.MULTILINE,
        )  # fmt: skip
        for path in output.glob("*.safetensors"):
            load_file(path)
        for path in output.glob("*-state"):
            state_of(path)
        assert not [path for path in output.rglob(".*")]
    assert load_file(found)
    assert messages.count("training goes on, and older files stay") == 3


def test_a_file_that_outlived_a_save_that_failed_goes_with_the_next_one(tiny_file, pictures, tmp_path, monkeypatch):
    write = RunFiles._write

    def full_at_3(self: RunFiles, path: Path, *more) -> None:
        if path.name == "lora-step00000003.safetensors":
            raise CannotWrite(path, "no room")
        write(self, path, *more)

    monkeypatch.setattr(RunFiles, "_write", full_at_3)
    train(tiny.arguments(tiny_file, pictures, tmp_path / "out", save_every_n_steps=1, save_last_n_steps=1))
    steps = sorted(path.stem for path in (tmp_path / "out").glob("lora-step*"))
    assert steps == ["lora-step00000007", "lora-step00000008"]


# --- names that cannot be taken, and leftovers -----------------------------------------------------------------------


@pytest.mark.parametrize("num_refusals", [3, 1000])
def test_a_file_that_another_program_has_open_is_waited_for_and_then_has_another_name(
    num_refusals, tmp_path, monkeypatch
):
    """As Windows answers; elsewhere a name can always be taken."""
    path, refusals, replace = tmp_path / "lora.txt", [], os.replace
    write_text_whole(path, "old")

    def refuse(source: Path, target: Path) -> None:
        if target == path and len(refusals) < num_refusals:
            refusals.append(target)
            raise PermissionError(errno.EACCES, "Access is denied")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr("time.sleep", lambda _: None)
    if num_refusals == 3:
        write_text_whole(path, "new")
        assert path.read_text() == "new"
        return
    with pytest.raises(CannotWrite, match=r"lora\.txt cannot be written: .*the new file is .*lora-new\.txt"):
        write_text_whole(path, "new")
    assert (path.read_text(), (tmp_path / "lora-new.txt").read_text()) == ("old", "new")
    assert len(list(tmp_path.iterdir())) == 2


def test_leftovers_go_when_their_writer_no_longer_runs(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    living = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    of_mine = temporary_beside(tmp_path / "lora 猫.safetensors").name
    mine = f"-{os.getpid()}-"
    names = {
        "dead": of_mine.replace(mine, f"-{dead.pid}-"),
        "living": of_mine.replace(mine, f"-{living.pid}-"),
        "mine, of a process that had this id": of_mine,
        "elsewhere, young": re.sub("-[0-9a-f]{6}-", "-zzzzzz-".replace("z", "0"), of_mine),
        "elsewhere, old": re.sub("-[0-9a-f]{6}-", "-111111-", of_mine),
        "of the user": ".lora.tmp.safetensors",
    }
    for name in names.values():
        (tmp_path / name).touch()
    os.utime(tmp_path / names["elsewhere, old"], (1e9, 1e9))
    remove_leftovers([tmp_path, tmp_path / "missing"])
    stay = {key for key, name in names.items() if (tmp_path / name).exists()}
    living.communicate(b"\n")
    assert stay == {"living", "elsewhere, young", "of the user"}


def test_a_state_that_was_set_aside_is_back_where_there_is_none_in_its_place(tmp_path):
    for name in ("a-state", "v1.5-state"):
        aside = temporary_beside(tmp_path / name, "old") / name
        aside.mkdir(parents=True)
        (aside / "old").touch()
    (tmp_path / "a-state").mkdir()
    remove_leftovers([tmp_path])
    assert not (tmp_path / "a-state" / "old").exists() and (tmp_path / "v1.5-state" / "old").exists()
    assert len(list(tmp_path.iterdir())) == 2
