"""Short runs of the whole script with optimizers and schedules that are more than a class and a rate."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from library.families.sd import sd_adapter_targets
from tests import tiny
from tests.results import scalars
from train_network import train

STEPS = 4


@pytest.fixture
def run(tiny_file, pictures, tmp_path):
    """Train four steps on a U-Net alone; returns the output folder."""

    def run(name: str, **options) -> Path:
        common = dict(max_train_epochs=None, max_train_steps=STEPS, network_train_unet_only=True)
        train(tiny.arguments(tiny_file, pictures, tmp_path / name, **(common | options)))
        return tmp_path / name

    return run


def up_weights(path: Path) -> dict[str, torch.Tensor]:
    return {name: value for name, value in load_file(path).items() if "lora_up" in name}


def parameter_names() -> list[str]:
    """The trained parameters of the U-Net's network under their names in files, in the optimizer's order."""
    unet, _, (text_encoder,) = tiny.models()
    layers = [target.name for target in sd_adapter_targets(text_encoder, unet, conv=False) if target.part == "unet"]
    return [f"{layer}.{matrix}.weight" for layer in layers for matrix in ("lora_down", "lora_up")]


def test_schedule_free_files_and_samples_are_of_the_averaged_weights(run, tmp_path):
    """arXiv:2405.15682: gradients are taken at y = (1 - beta) z + beta x, and x is the mean of all z so far."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 2 --d 7\n", encoding="utf-8")
    options = dict(optimizer_type="AdamWScheduleFree", learning_rate=0.05, sample_prompts=prompts)
    output = run("out", save_every_n_steps=1, save_state=True, sample_every_n_steps=STEPS, **options)
    names, mean = parameter_names(), None
    for step in range(1, STEPS + 1):
        name = f"lora-step{step:08d}"
        saved = load_file(output / f"{name}.safetensors")
        state = torch.load(output / f"{name}-state" / "optimizer.bin", weights_only=False)
        points = [entry["z"] for _, entry in sorted(state["state"].items())]
        mean = points if mean is None else [m + (z - m) / step for m, z in zip(mean, points, strict=True)]
        for key, x in zip(names, mean, strict=True):
            torch.testing.assert_close(saved[key], x, rtol=1e-4, atol=1e-5)
    trained_at = [(1 - 0.9) * z + 0.9 * x for z, x in zip(points, mean, strict=True)]
    assert any((y - saved[key]).abs().max() > 1e-3 for key, y in zip(names, trained_at, strict=True))

    again = run(
        "again", network_weights=output / "lora.safetensors", sample_prompts=prompts, sample_at_first=True,
        max_train_steps=1,
    )  # fmt: skip
    (while_training,), (of_the_file,) = ((folder / "sample").iterdir() for folder in (output, again))
    pixels = [np.asarray(Image.open(path), dtype=int) for path in (while_training, of_the_file)]
    assert abs(pixels[0] - pixels[1]).max() <= 1


@pytest.mark.parametrize("name", ["Prodigy", "DAdaptAdam"])
def test_an_optimizer_that_finds_its_rate_logs_it(name, run, tmp_path):
    output = run("out", optimizer_type=name, learning_rate=1, logging_dir=tmp_path / "logs")
    logged = scalars(tmp_path / "logs")
    assert {tag for tag in logged if tag.startswith("lr/")} == {"lr/unet", "lr/d*lr/unet"}
    assert logged["lr/unet"] == [1.0] * STEPS
    found = logged["lr/d*lr/unet"]
    assert 0 < found[0] < found[-1] < 1
    assert any(value.any() for value in up_weights(output / "lora.safetensors").values())


def test_any_class_of_a_package_trains_under_any_class_of_schedule(run, tmp_path):
    output = run(
        "out", optimizer_type="pytorch_optimizer.CAME", optimizer_args=["betas=0.9,0.99,0.999"],
        lr_scheduler_type="torch.optim.lr_scheduler.ExponentialLR", lr_scheduler_args=["gamma=0.5"],
        logging_dir=tmp_path / "logs",
    )  # fmt: skip
    assert scalars(tmp_path / "logs")["lr/unet"] == pytest.approx([0.001 * 0.5**step for step in range(1, STEPS + 1)])
    ups = up_weights(output / "lora.safetensors").values()
    assert all(value.isfinite().all() for value in ups) and any(value.any() for value in ups)
