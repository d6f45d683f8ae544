"""What happens to a run that loses its memory, its numbers, a process, a picture, a file or a tracker.

All of it really happens here, but for the memory of a GPU, which PyTorch's own error stands for.
"""

import io
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file, save_file

from library.dataset.latent_pack import read_entries
from library.errors import Diverged, OutOfMemory, UserError
from library.options.groups import TrainNetworkOptions
from library.training import network_recipe, prompts
from library.training.divergence import SkippedSteps
from library.training.gradients import SeparateGradients
from library.training.loop import update
from library.training.memory_errors import is_out_of_memory, memory_for, sentence
from library.training.network_recipe import NetworkRecipe
from library.training.optimizers import OPTIMIZERS, build_optimizer
from library.training.rescue import kept_when_it_fails
from library.training.saving import LoopState, SkipCount
from tests import tiny
from tests.results import metadata_of, weights_equal
from train_network import train

ROOT = Path(__file__).parents[1]
NETWORK = "lora.safetensors"


def run(arguments: list[str], prelude: str = "") -> subprocess.CompletedProcess[str]:
    """The script in a process of its own, for its exit code and all it says."""
    code = f"import sys\n{prelude}\nimport train_network\ntrain_network.run_script(train_network.train)"
    environment = os.environ | {"PYTHONUTF8": "1", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", code, *arguments]
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, encoding="utf-8", timeout=300)


def after_step(monkeypatch: pytest.MonkeyPatch, step: int, happens: Callable[[], object]) -> None:
    """Have something happen to the run behind a step."""
    finished = NetworkRecipe.step_finished

    def step_finished(recipe: NetworkRecipe, state) -> None:
        finished(recipe, state)
        if state.step == step:
            happens()

    monkeypatch.setattr(NetworkRecipe, "step_finished", step_finished)


def spoil(model: Path, path: Path, part: str) -> Path:
    """The model with NaN in the first weights whose name has `part`."""
    weights = load_file(model)
    name = next(name for name in weights if part in name)
    weights[name] = torch.full_like(weights[name], float("nan"))
    save_file(weights, path)
    return path


def spoil_latents(path: Path) -> None:
    with np.load(path) as file:
        arrays = dict(file)
    arrays["latents"] = np.full_like(arrays["latents"], np.nan)
    np.savez(path, **arrays)


# Memory


LIMITED = """
import resource
from library.recipes import network
run = network.run
def limited(*arguments):
    pages = int(open("/proc/self/statm").read().split()[0])
    most = pages * resource.getpagesize() + 80 * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    return run(*arguments)
network.run = limited
"""


@pytest.mark.skipif(sys.platform != "linux", reason="sets a limit of Linux")
def test_too_little_memory_names_step_batch_and_savers_and_keeps_what_was_learned(tiny_file, tmp_path):
    pictures = tiny.write_pictures(tmp_path / "train", "1_cat", count=3)
    Image.new("RGB", (640, 640)).save(pictures / "1_cat" / "large.png")
    arguments = tiny.arguments(
        tiny_file, pictures, tmp_path / "out", resolution="640,640", max_bucket_reso=640, bucket_no_upscale=True,
        network_train_unet_only=True, seed=3,
    )  # fmt: skip
    done = run(arguments, LIMITED)
    assert done.returncode == 4, done.stderr[-2000:]
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    found = re.match(
        r"error: this computer ran out of memory in step (\d), 1 picture of 640x640(?: \(it asked for [\d.]+ GiB\))?; "
        "what needs less, the cheapest first: (.*)",
        error,
    )
    assert found and int(found[1]) > 1, error
    assert found[2].split(", ") == [
        "fewer other programs at the same time", "--cache_latents_to_disk", "--mixed_precision bf16 or fp16",
        "--optimizer_type AdamW8bit", "--gradient_checkpointing", "--fp8_base", "--cpu_offload_checkpointing",
        "--base_quantization nf4", "--blocks_to_swap", "--full_bf16", "a smaller --network_dim",
        "a smaller --resolution",
    ]  # fmt: skip
    kept = load_file(tmp_path / "out" / f"lora-step{int(found[1]) - 1:08d}.safetensors")
    assert any(value.any() for name, value in kept.items() if "lora_up" in name)


def test_an_optimizer_without_memory_for_its_state_names_step_and_batch_too(tiny_file, pictures, tmp_path, monkeypatch):
    def failing(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")  # no GPU is here to raise it

    monkeypatch.setattr(torch.optim.AdamW, "step", failing)
    with pytest.raises(
        OutOfMemory, match=r"the GPU ran out of memory in step 1, 1 picture of \d+x\d+ \(it asked for 20"
    ):
        train(tiny.arguments(tiny_file, pictures, tmp_path / "out"))


def test_memory_errors_are_known_whoever_raises_them():
    with pytest.raises(RuntimeError) as torch_error:
        torch.empty(2**46)
    with pytest.raises(MemoryError) as numpy_error:
        np.empty(2**46)
    for error in (torch_error.value, numpy_error.value, torch.OutOfMemoryError("CUDA out of memory.")):
        assert is_out_of_memory(error)
        with pytest.raises(OutOfMemory), memory_for("caching latents", TrainNetworkOptions()):
            raise error
    assert not is_out_of_memory(RuntimeError("shapes do not match"))


def test_a_gpu_s_memory_is_told_from_the_computers():
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")
    options = TrainNetworkOptions(cache_latents=True, mixed_precision="bf16", gradient_checkpointing=True)
    said = sentence(error, "training", options, "in step 7, 4 pictures of 512x768")
    assert said.startswith("the GPU ran out of memory in step 7, 4 pictures of 512x768 (it asked for 2.00 GiB); ")
    assert "--cache_latents" not in said and "--gradient_checkpointing," not in said and "--fp8_base" in said
    assert "--vae_batch_size 1" in sentence(error, "caching latents", TrainNetworkOptions(vae_batch_size=4))


# Numbers


def trained(name: str) -> tuple[torch.nn.Parameter, object, Accelerator]:
    """A weight after two steps of an optimizer."""
    accelerator = Accelerator(cpu=True)
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 4096).view(64, 64))
    given = ["relative_step=False"] if OPTIMIZERS[name].relative_step else None
    rate = 1.0 if OPTIMIZERS[name].adapts_lr else 1e-3
    options = TrainNetworkOptions(optimizer_type=name, learning_rate=rate, optimizer_args=given)
    optimizer, spec, _ = build_optimizer(options, [{"params": [weight], "lr": options.learning_rate, "name": "unet"}])
    optimizer = accelerator.prepare(optimizer)
    if spec.schedule_free:
        optimizer.train()
    for _ in range(2):
        step(weight, optimizer, accelerator, weight.square().sum())
    return weight, optimizer, accelerator


def as_bytes(weight: torch.nn.Parameter, optimizer) -> bytes:
    """Weight and optimizer to the last bit."""
    file = io.BytesIO()
    torch.save((weight.detach(), optimizer.state_dict()), file)
    return file.getvalue()


def step(weight, optimizer, accelerator, loss: torch.Tensor) -> bool:
    accelerator.backward(loss)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    gradients = SeparateGradients([weight])
    taken = update(gradients, optimizer, schedule, accelerator, 1.0)
    gradients.clear()
    return taken


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_skipped_step_changes_nothing_in_any_optimizer(name):
    pytest.importorskip(OPTIMIZERS[name].path.split(".")[0])
    weight, optimizer, accelerator = trained(name)
    before = as_bytes(weight, optimizer)
    assert not step(weight, optimizer, accelerator, (weight * float("nan")).sum())
    assert not step(weight, optimizer, accelerator, (weight * 1e38).square().sum())
    assert as_bytes(weight, optimizer) == before
    assert step(weight, optimizer, accelerator, weight.square().sum())
    assert weight.isfinite().all() and as_bytes(weight, optimizer) != before


def test_the_scaler_of_fp16_looking_for_its_scale_is_no_divergence():
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    weight = torch.nn.Parameter(torch.ones(4))
    optimizer = accelerator.prepare(torch.optim.AdamW([weight]))
    skipped = SkippedSteps(TrainNetworkOptions(max_skipped_steps=0), accelerator, SkipCount())
    taken = []
    for number in range(5):
        taken.append(step(weight, optimizer, accelerator, (weight * 3).square().sum()))
        if not taken[-1]:
            skipped.skipped(number, lambda: None, loss_is_finite=True)
    assert taken[0] is False and taken[-1] is True and skipped.count.total == 0
    with pytest.raises(Diverged):
        skipped.skipped(6, lambda: None, loss_is_finite=False)


def test_one_picture_of_nan_is_named_once_its_steps_are_skipped_and_the_run_ends_well(
    tiny_file, pictures, tmp_path, capsys
):
    arguments = tiny.arguments(
        tiny_file, pictures, tmp_path / "out", cache_latents_to_disk=True, skip_cache_check=True, max_train_epochs=2
    )
    train(arguments)
    spoil_latents(next(pictures.rglob("picture 2_*.npz")))
    train([*arguments, "--output_name", "second"])
    said = capsys.readouterr().err
    assert said.count("is no number") == 1
    assert re.search(r"step \d+ was skipped, .*: the cached latents of .*picture 2\.png hold NaN; delete", said)
    assert "4 steps skipped in this run" in said
    assert all(value.isfinite().all() for value in load_file(tmp_path / "out" / "second.safetensors").values())


def test_latents_of_nan_are_made_anew_where_caches_are_checked(tiny_file, pictures, tmp_path, capsys):
    arguments = tiny.arguments(tiny_file, pictures, tmp_path / "out", cache_latents_to_disk=True)
    train(arguments)
    path = next(pictures.rglob("picture 2_*.npz"))
    spoil_latents(path)
    train(arguments)
    assert "made anew: 1 damaged" in capsys.readouterr().err
    assert np.isfinite(np.load(path)["latents"]).all()


def test_a_vae_of_nan_ends_the_run_with_its_name(tiny_file, pictures, tmp_path):
    model = spoil(tiny_file, tmp_path / "nan.safetensors", "first_stage_model.encoder.conv_in.weight")
    with pytest.raises(Diverged) as caught:
        train(
            tiny.arguments(
                model, pictures, tmp_path / "out", cache_latents=False, max_train_epochs=9, max_skipped_steps=4
            )
        )
    (said,) = caught.value.problems
    assert caught.value.exit_code == 5
    assert "in 5 steps in a row, the last of them step 5; none of them changed the network" in said
    assert re.search(r"the VAE makes NaN of .*picture \d\.png; use --no_half_vae", said)
    assert not list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.parametrize("spoils", ["loss", "weights"])
def test_a_rate_that_is_too_high_is_named_and_files_saved_before_stay_whole(
    spoils, tiny_file, pictures, tmp_path, monkeypatch
):
    taken = []

    def overflow(recipe: NetworkRecipe, _: torch.Tensor | bool) -> None:
        taken.append(recipe)
        if len(taken) == 4:
            with torch.no_grad():
                next(recipe.network.parameters()).fill_(float("inf"))

    if spoils == "weights":  # as an optimizer does whose own numbers overflow
        monkeypatch.setattr(NetworkRecipe, "weights_updated", overflow)
    arguments = tiny.arguments(
        tiny_file, pictures, tmp_path / "out", learning_rate=1e25 if spoils == "loss" else 1e-3, max_train_epochs=5,
        save_every_n_steps=1, save_last_n_steps=1, save_state=True,
    )  # fmt: skip
    with pytest.raises(Diverged, match="in 11 steps in a row, .*: .*lower --learning_rate"):
        train(arguments)
    saved = sorted((tmp_path / "out").glob("*.safetensors"))
    assert saved and not (tmp_path / "out" / NETWORK).exists()
    assert all(value.isfinite().all() for path in saved for value in load_file(path).values())
    assert spoils == "loss" or saved[-1].stem == "lora-step00000003"


# Processes


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
@pytest.mark.parametrize("persistent", [False, True])
def test_a_killed_worker_is_replaced_and_the_result_is_the_same(
    persistent, tiny_file, pictures, tmp_path, monkeypatch, capsys
):
    more = dict(cache_latents=False, flip_aug=True, max_train_epochs=2)
    train(tiny.arguments(tiny_file, pictures, tmp_path / "whole", **more))
    killed = []

    def kill_a_worker() -> None:
        worker = multiprocessing.active_children()[-1]
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()
        killed.append(worker.pid)

    after_step(monkeypatch, 3, kill_a_worker)
    more |= dict(max_data_loader_n_workers=2, persistent_data_loader_workers=persistent)
    train(tiny.arguments(tiny_file, pictures, tmp_path / "out", **more))
    assert killed
    assert capsys.readouterr().err.count("a process that reads pictures was ended from outside") == 1
    assert weights_equal(tmp_path / "whole" / NETWORK, tmp_path / "out" / NETWORK)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_where_workers_are_killed_again_and_again_the_run_reads_by_itself(
    tiny_file, pictures, tmp_path, monkeypatch, capsys
):
    more = dict(cache_latents=False, flip_aug=True, max_train_epochs=2)
    train(tiny.arguments(tiny_file, pictures, tmp_path / "whole", **more))
    for number in (1, 2, 3, 9, 10):
        after_step(
            monkeypatch,
            number,
            lambda: [os.kill(worker.pid, signal.SIGKILL) for worker in multiprocessing.active_children()],
        )
    train(tiny.arguments(tiny_file, pictures, tmp_path / "out", max_data_loader_n_workers=2, **more))
    assert "training goes on with no such processes" in capsys.readouterr().err
    assert weights_equal(tmp_path / "whole" / NETWORK, tmp_path / "out" / NETWORK)


@pytest.mark.parametrize(
    "told",
    [
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:25815.",
        "NCCL error in: ProcessGroupNCCL.cpp:1970\nncclRemoteError: A call failed possibly due to a network error or a "
        "remote process exiting prematurely.",
    ],
)
def test_that_another_process_has_ended_is_told_in_a_sentence(told):
    class Nothing:
        def keep(self, state: LoopState) -> None: ...

    ended = pytest.raises(UserError, match="another process of this run has ended")
    with ended, kept_when_it_fails(Nothing(), LoopState()):
        raise RuntimeError(told)


# Files


def steps_of(path: Path) -> int:
    return int(metadata_of(path)["ss_steps"])


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_picture_that_vanishes_is_named_once_and_left_out(
    batch_size, num_workers, tiny_file, pictures, tmp_path, monkeypatch, capsys
):
    after_step(monkeypatch, 1, (pictures / "2_cat" / "picture 1.png").unlink)
    arguments = tiny.arguments(
        tiny_file, pictures, tmp_path / "out", cache_latents=False, max_train_epochs=3, train_batch_size=batch_size,
        max_data_loader_n_workers=num_workers,
    )  # fmt: skip
    train(arguments)
    said = re.findall(r"left out of its batches from now on: (.*)", capsys.readouterr().err)
    assert len(said) == 1 and "picture 1.png (the file is not there any more)" in said[0]
    assert steps_of(tmp_path / "out" / NETWORK) == 24 // batch_size


def test_a_picture_that_breaks_is_left_out_too(tiny_file, pictures, tmp_path, monkeypatch, capsys):
    after_step(monkeypatch, 1, lambda: (pictures / "2_cat" / "picture 1.png").write_bytes(b""))
    train(tiny.arguments(tiny_file, pictures, tmp_path / "out", cache_latents=False, max_train_epochs=2))
    assert "picture 1.png (the file is empty)" in capsys.readouterr().err


def test_a_dataset_that_vanishes_ends_the_run_in_a_sentence_and_what_was_learned_is_kept(
    tiny_file, pictures, tmp_path, monkeypatch
):
    after_step(monkeypatch, 2, lambda: shutil.rmtree(pictures))
    with pytest.raises(UserError, match="no picture can be read any more, is their drive still there?"):
        train(tiny.arguments(tiny_file, pictures, tmp_path / "out", cache_latents=False))
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == ["lora-step00000002.safetensors"]


def test_what_is_kept_is_of_this_run_and_a_signal_to_end_waits_for_it(tiny_file, pictures, tmp_path, monkeypatch):
    """Where one of several processes fails, the launcher sends SIGTERM to the others, which keep what was learned."""
    kept = tmp_path / "out" / "lora-step00000002.safetensors"
    kept.parent.mkdir()
    kept.write_bytes(b"of an earlier run")
    after_step(monkeypatch, 2, lambda: shutil.rmtree(pictures))
    keep = NetworkRecipe.keep

    def keep_while_told_to_end(recipe: NetworkRecipe, state) -> None:
        signal.raise_signal(signal.SIGTERM)
        keep(recipe, state)

    monkeypatch.setattr(NetworkRecipe, "keep", keep_while_told_to_end)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended before the network was kept"))
    try:
        with pytest.raises(UserError, match="no picture can be read any more"):
            train(tiny.arguments(tiny_file, pictures, tmp_path / "out", cache_latents=False))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert steps_of(kept) == 2


def test_too_many_lost_pictures_end_the_run_in_a_sentence(tiny_file, tmp_path, monkeypatch):
    pictures = tiny.write_pictures(tmp_path / "train", count=8)
    lost = sorted(pictures.rglob("*.png"))[:5]
    after_step(monkeypatch, 1, lambda: [path.unlink() for path in lost])
    with pytest.raises(UserError, match="4 pictures can no longer be read, so training does not go on without them"):
        train(tiny.arguments(tiny_file, pictures, tmp_path / "out", cache_latents=False, max_train_epochs=2))


BREAKS = {
    "vanished": lambda path: path.unlink(),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:200]),
    "of another size": lambda path: np.savez(
        path, latents=np.zeros((4, 3, 3), np.float32), original_size=[24, 24], crop_ltrb=[0, 0, 24, 24]
    ),
}


def test_a_damaged_entry_of_a_pack_is_named_once_left_out_and_made_anew(tiny_file, pictures, tmp_path, capsys):
    more = dict(cache_latents_to_disk=True, latent_cache="packed", max_train_epochs=2, train_batch_size=2)
    arguments = tiny.arguments(tiny_file, pictures, tmp_path / "out", **more)
    train(arguments)
    (pack,) = pictures.rglob("*.pack")
    rows = read_entries(pack).rows
    data = bytearray(pack.read_bytes())
    data[int(rows["numbers"][1]) + 100] ^= 1
    pack.write_bytes(data)
    train(arguments)
    said = re.findall(r"left out of its batches from now on: (.*)", capsys.readouterr().err)
    assert len(said) == 1 and "_sd.npz are damaged in " in said[0]
    train(arguments)
    said = capsys.readouterr().err
    assert "3 of 4 pictures have theirs on disk; made anew: 1 damaged" in said and "left out" not in said


@pytest.mark.parametrize("how", BREAKS)
def test_a_cache_file_that_breaks_while_training_is_named_once_and_left_out(
    how, tiny_file, pictures, tmp_path, monkeypatch, capsys
):
    after_step(monkeypatch, 1, lambda: BREAKS[how](next(pictures.rglob("picture 1_*.npz"))))
    arguments = tiny.arguments(
        tiny_file, pictures, tmp_path / "out", cache_latents_to_disk=True, max_train_epochs=2, train_batch_size=2
    )
    train(arguments)
    said = re.findall(r"left out of its batches from now on: (.*)", capsys.readouterr().err)
    assert len(said) == 1 and "picture 1_" in said[0]
    assert steps_of(tmp_path / "out" / NETWORK) == 8


@pytest.mark.parametrize("how", ["vanished", "cut off"])
def test_a_text_file_that_breaks_while_training_is_left_out(
    how, tiny_sdxl_file, pictures, tmp_path, monkeypatch, capsys
):
    after_step(monkeypatch, 1, lambda: BREAKS[how](next(pictures.rglob("picture 1_te_outputs.npz"))))
    arguments = tiny.arguments(
        tiny_sdxl_file, pictures, tmp_path / "out", cache_text_encoder_outputs_to_disk=True, train_batch_size=2,
        network_train_unet_only=True, max_train_epochs=2,
    )  # fmt: skip
    train(arguments)
    assert "left out of its batches from now on: text encoder outputs " in capsys.readouterr().err
    train(arguments)
    assert "text encoder outputs: 3 of 4 pictures have theirs on disk" in capsys.readouterr().err


# Trackers and previews


def fill_up(logs: Path) -> None:
    """As a full disk: every write to the events fails."""
    (events,) = logs.rglob("events.*")
    events.unlink()
    events.symlink_to("/dev/full")


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(("happens", "why"), [(shutil.rmtree, "No such file"), (fill_up, "No space left on device")])
def test_a_tracker_that_loses_its_folder_or_disk_is_named_once(
    happens, why, tiny_file, pictures, tmp_path, monkeypatch, capsys
):
    after_step(monkeypatch, 2, lambda: happens(tmp_path / "logs"))
    train(tiny.arguments(tiny_file, pictures, tmp_path / "out", logging_dir=tmp_path / "logs"))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "takes no more curves" in line]
    assert "tensorboard takes no more curves, and training goes on: " in line and why in line
    assert (tmp_path / "out" / NETWORK).is_file()


def test_a_preview_too_large_for_the_memory_is_a_warning_and_the_result_is_the_same(
    tiny_file, pictures, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(prompts, "MAX_SIDE", 10**7)  # so that a computer with much memory has too little as well
    train(tiny.arguments(tiny_file, pictures, tmp_path / "plain"))
    train(
        tiny.arguments(
            tiny_file, pictures, tmp_path / "out", sample_every_n_steps=4, before_after=True,
            sample_prompts="a cat --w 8000000 --h 8000000 --s 1",
        )
    )  # fmt: skip
    said = capsys.readouterr().err
    warning = (
        r"no previews at step 4, and training goes on: .* ran out of memory while drawing previews .*--sample_prompts"
    )
    assert re.search(warning, said)
    assert "no previews at the end" in said
    assert weights_equal(tmp_path / "plain" / NETWORK, tmp_path / "out" / NETWORK)


def test_a_preview_of_nan_is_black_and_said(tiny_file, pictures, tmp_path, capsys):
    model = spoil(tiny_file, tmp_path / "nan.safetensors", "first_stage_model.decoder.conv_in.weight")
    train(
        tiny.arguments(
            model, pictures, tmp_path / "out", sample_every_n_epochs=1, sample_prompts="a cat --w 64 --h 64 --s 1"
        )
    )
    assert "the picture of 'a cat' is black: the VAE makes NaN of it; --no_half_vae helps" in capsys.readouterr().err
    (picture,) = (tmp_path / "out" / "sample").iterdir()
    assert not np.asarray(Image.open(picture)).any()


def test_a_preview_that_fails_for_want_of_a_gpu_s_memory_is_a_warning(
    tiny_file, pictures, tmp_path, monkeypatch, capsys
):
    def failing(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")  # no GPU is here to raise it

    monkeypatch.setattr(network_recipe, "save_samples", failing)
    arguments = tiny.arguments(tiny_file, pictures, tmp_path / "out", sample_prompts="a cat", sample_at_first=True)
    train(arguments)
    assert "no previews at step 0, and training goes on: the GPU ran out of memory" in capsys.readouterr().err
    assert (tmp_path / "out" / NETWORK).is_file()


def test_weights_that_the_file_s_format_cannot_hold_are_not_saved(tiny_file, pictures, tmp_path, capsys):
    with pytest.raises(Diverged, match="try a lower --unet_lr"):
        train(
            tiny.arguments(
                tiny_file, pictures, tmp_path / "out", learning_rate=None, unet_lr=1e20, network_train_unet_only=True,
                save_precision="fp16", save_every_n_steps=1, max_skipped_steps=2,
            )
        )  # fmt: skip
    for path in (tmp_path / "out").glob("*.safetensors"):
        assert all(value.isfinite().all() for value in load_file(path).values()), path.name
    assert "is not saved, and older files stay" in capsys.readouterr().err
