"""Two processes on the CPU train what one process trains with twice the batch, and one set of files appears."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny
from tests.results import scalars
from tests.two_processes import toy_weights
from train_network import train

ROOT = Path(__file__).parents[1]
ANY_PORT = ("--main_process_port", "0")  # that is free
FLAGS = (
    *("--multi_gpu", "--num_machines", "1", "--num_processes", "2", *ANY_PORT),
    *("--mixed_precision", "no", "--dynamo_backend", "no"),
)
CONFIGS = ROOT / "config_examples" / "accelerate"
# What is left are the last bits of sums taken in another order (a convolution goes another way where a batch has fewer
# pixels): up to 2.4e-7 of weights that moved by 0.01. Adam, which divides
# by a gradient's own size, makes more of them where a gradient is next to nothing, up to 5e-5 seen at steps of 1e-3.
TOLERANCE = dict(rtol=1e-5, atol=5e-7)
TOLERANCE_OF_ADAM = dict(rtol=1e-5, atol=2e-4)
ZERO_AT_FIRST = re.compile(r"\.(lora_up\.weight|hada_w2_a|lokr_w2|lokr_w2_b)$")
PLAIN = dict(optimizer_type="SGD", optimizer_args=["momentum=0.9"], learning_rate=1)

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gloo over torchrun is for Linux and macOS")


def start(launch: Sequence[str], words: list[str]) -> subprocess.Popen:
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", *launch, *words]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")
    return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)


def finish(launched: subprocess.Popen, dies: bool = False) -> str:
    stdout, stderr = launched.communicate(timeout=500)
    assert launched.returncode == dies and ("exitcode  : 9" in stderr) == dies, stderr[-3000:]
    return stdout


def in_two_processes(given: dict, folder: Path, launch: Sequence[str] = FLAGS) -> tuple[dict, dict, str]:
    """Run tests/two_processes.py; what each process found, and what both said."""
    given_path = folder / "given.json"
    given_path.write_text(json.dumps(given | {"facts": str(folder / "facts")}), encoding="utf-8")
    said = finish(start(launch, ["-m", "tests.two_processes", str(given_path)]), "dies" in given)
    first, second = (json.loads((folder / f"facts-{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1))
    return first, second, said


def files_of(paths: list[str], folder: Path) -> list[Path]:
    """Those inside a folder, without the ones that are still to be renamed."""
    return [path for path in map(Path, paths) if path.is_relative_to(folder) and not path.name.startswith(".")]


def assert_weights_near(found: Path, wanted: Path, tolerance: dict = TOLERANCE) -> None:
    found, wanted = load_file(found), load_file(wanted)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, **tolerance, msg=lambda text, name=name: f"{name}: {text}")
    assert any(value.any() for name, value in wanted.items() if ZERO_AT_FIRST.search(name))


@pytest.fixture
def uneven_pictures(tmp_path) -> Path:
    """Buckets of 3 and 2 pictures, so that the last batch of one is short."""
    return tiny.write_pictures(tmp_path / "uneven", "1_cat", count=5)


def test_two_processes_train_as_one_with_twice_the_batch_and_one_that_dies_leaves_what_was_learned(
    tiny_file, pictures, uneven_pictures, tmp_path
):
    """The one that dies does so in the last run of the two, after all else."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 2 --d 7\n", encoding="utf-8")
    common = dict(max_train_epochs=2, cache_latents=False, max_grad_norm=0)
    toy = tiny.arguments(tiny_file, uneven_pictures, tmp_path / "toy", **common)
    output = tmp_path / "输出 out"
    run = tiny.arguments(
        tiny_file, pictures, output, network_args=["module_dropout=0.5"], sample_prompts=prompts, before_after=True,
        save_state=True, sample_every_n_epochs=1, console_log_file=tmp_path / "log.txt", cache_latents_to_disk=True,
        logging_dir=tmp_path / "curves",
    )  # fmt: skip
    dies = tiny.arguments(tiny_file, pictures, tmp_path / "dies", max_train_epochs=2)
    facts, others, said = in_two_processes(
        {"toy": [*toy, "--ddp_timeout", "7"], "runs": [run, [*run, "--dry_run"]], "dies": dies}, tmp_path
    )
    first, second = torch.tensor(facts["weights"])
    assert torch.equal(first, second)
    alone, _ = toy_weights([*toy, "--train_batch_size", "2"])
    torch.testing.assert_close(first, alone, rtol=1e-5, atol=1e-6)
    assert facts["timeout"] == 7 * 60

    names = sorted(path.name for path in output.iterdir())
    assert names == [
        "before_after.png",
        "lora-report.html",
        "lora-run.json",
        "lora-state",
        "lora.safetensors",
        "sample",
    ]
    assert len(list((output / "sample").iterdir())) == 1
    assert json.loads((output / "lora-state" / "train_state.json").read_text())["current_step"] == 4
    weights = load_file(output / "lora.safetensors")
    assert any(value.any() for name, value in weights.items() if "lora_up" in name)
    assert said.count("learning rate") == 3, "tables are for one process to print, in each run"

    written, elsewhere = (files_of(found["written"], tmp_path) for found in (facts, others))
    caches = [path for path in written + elsewhere if path.suffix == ".npz"]
    assert len(caches) == len(set(caches)) == 4, "each picture's latents are written once"
    assert {path.suffix for path in elsewhere} == {".npz"}, "all else is written by the main process"
    assert {output / "lora.safetensors", output / "before_after.png", tmp_path / "log.txt"} <= set(written)
    assert [path.name for path in (tmp_path / "dies").glob("*.safetensors")] == ["lora-step00000004.safetensors"]


EVERYTHING_RANDOM = dict(
    cache_latents=False, color_aug=True, flip_aug=True, random_crop=True, shuffle_caption=True,
    caption_dropout_rate=0.2, noise_offset=0.1, noise_offset_random_strength=True, adaptive_noise_scale=0.1,
    multires_noise_iterations=3, ip_noise_gamma=0.1, ip_noise_gamma_random_strength=True, min_snr_gamma=5,
    lr_scheduler="cosine", lr_warmup_steps=2, max_train_epochs=3, gradient_accumulation_steps=2, ema=True, **PLAIN,
)  # fmt: skip


def test_what_is_random_is_the_same_and_a_run_resumes_on_another_number_of_processes(
    tiny_folder, uneven_pictures, tmp_path
):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 2\n", encoding="utf-8")

    def arguments(name: str, train_batch_size: int, **more: object) -> list[str]:
        common = dict(save_state=True, save_every_n_steps=3, train_batch_size=train_batch_size) | EVERYTHING_RANDOM
        return tiny.arguments(tiny_folder, uneven_pictures, tmp_path / name, **common | more)

    curve = dict(logging_dir=tmp_path / "curve of one")
    train(arguments("one", 2, **curve))
    state = "lora-step00000003-state"
    shared = arguments("two", 1, sample_prompts=prompts, sample_every_n_steps=2, logging_dir=tmp_path / "curve of two")
    shutil.copytree(tmp_path / "one" / state, tmp_path / "two after one, 0" / state)
    later = arguments("two after one, RANK", 1, resume="auto")  # so that only the first process finds the state
    config = ("--config_file", str(CONFIGS / "two_gpus.yaml"), *ANY_PORT)
    in_two_processes({"runs": [shared, later], "late": 1}, tmp_path, config)  # steps are told one late, as on a GPU
    train(arguments("one after two", 2, resume=tmp_path / "two" / state))
    wanted = tmp_path / "one" / "lora.safetensors"
    for name in ("two", "two after one, 0", "one after two"):
        assert_weights_near(tmp_path / name / "lora.safetensors", wanted)
    one, two = scalars(tmp_path / "curve of one"), scalars(tmp_path / "curve of two")
    assert len(one["lr/unet"]) == 6
    for tag in ("loss/current", "lr/unet", "loss/epoch_average"):
        assert two[tag] == pytest.approx(one[tag], rel=1e-4)


VARIANTS = {
    "AdamW": dict(optimizer_type="AdamW", optimizer_args=None, learning_rate=1e-3),
    "latents on disk": dict(cache_latents_to_disk=True, flip_aug=True, gradient_checkpointing=True),
    "text encoder frozen": dict(network_train_unet_only=True, gradient_accumulation_steps=3, loss_type="huber"),
    "validation": dict(validation_split=0.2),
    "LoHa": dict(network_module="networks.loha", network_args=["conv_dim=2"], learning_rate=0.3),
    "LoKr": dict(network_module="networks.lokr", network_args=["conv_dim=1", "factor=4"], learning_rate=0.1),
    "DoRA": dict(network_module="networks.dora", network_args=["conv_dim=2"]),
    "convolutions": dict(network_args=["conv_dim=2"], noise_offset=0.1, adaptive_noise_scale=0.5),
}


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [2, 3])
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_variants_train_the_same(family, num_processes, uneven_pictures, tmp_path):
    """With three processes a batch of two pictures leaves one without any."""
    model = tiny.write_file(tmp_path / "model.safetensors", kind=family)

    def arguments(name: str, variant: str, train_batch_size: int) -> list[str]:
        common = dict(max_train_epochs=3, shuffle_caption=True, train_batch_size=train_batch_size)
        return tiny.arguments(model, uneven_pictures, tmp_path / variant / name, **common | PLAIN | VARIANTS[variant])

    runs = [arguments("shared", variant, 1) for variant in VARIANTS]
    launch = [str(num_processes) if word == "2" else word for word in FLAGS]
    in_two_processes({"runs": runs}, tmp_path, launch)
    for variant in VARIANTS:
        train(arguments("alone", variant, num_processes))
        files = [tmp_path / variant / name / "lora.safetensors" for name in ("shared", "alone")]
        assert_weights_near(*files, TOLERANCE_OF_ADAM if variant == "AdamW" else TOLERANCE)


@pytest.mark.slow
def test_two_machines_train_as_one_process(tiny_file, uneven_pictures, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    here = ("--main_process_ip", "127.0.0.1", "--main_process_port", port, "--num_processes", "2")
    config = ("--config_file", str(CONFIGS / "two_machines.yaml"), *here)
    shared = tiny.arguments(tiny_file, uneven_pictures, tmp_path / "shared", max_train_epochs=2, **PLAIN)
    launched = [start((*config, "--machine_rank", rank), ["train_network.py", *shared]) for rank in "01"]
    for one in launched:
        finish(one)
    alone = dict(max_train_epochs=2, train_batch_size=2, **PLAIN)
    train(tiny.arguments(tiny_file, uneven_pictures, tmp_path / "alone", **alone))
    assert_weights_near(*(tmp_path / name / "lora.safetensors" for name in ("shared", "alone")))
