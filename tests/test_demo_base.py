"""The embedded base: a real model that draws what it is asked for, and that a short training teaches something new."""

from pathlib import Path

import numpy as np
import pytest
import torch

from library.dataset.dataset import TrainingDataset, collate
from library.dataset.sampler import Draw
from library.dataset.scan import scan_dataset
from library.families.sd import Sd
from library.options.groups import TrainNetworkOptions
from library.recipes.network_building import build_network
from library.training.denoising import Ddpm, denoising_loss
from library.training.prompts import SamplePrompt
from library.training.sampling import draw
from networks import lora
from tests import tiny
from train_network import train

ROOT = Path(__file__).parents[1]
BASE = ROOT / "assets" / "demo_base"
PICTURES = ROOT / "assets" / "demo_pictures" / "train"
FACTOR = 2.0  # at least by this much the loss on the new pictures must fall in 36 steps (measured: 2.9)
CPU = torch.device("cpu")


def family_of(**more) -> Sd:
    return Sd(TrainNetworkOptions(pretrained_model_name_or_path=str(BASE), **more), CPU, torch.float32)


def loss_on_fixed_noise(family: Sd) -> float:
    """Mean loss of the twelve pictures at four timesteps each, the same noise every time."""
    options = TrainNetworkOptions(train_data_dir=str(PICTURES), resolution="128", caption_extension=".txt")
    dataset = TrainingDataset(scan_dataset(options), options, seed=0, max_train_steps=1)
    batch = collate([dataset[Draw(index, 0, 1, 0)] for index in range(12)])
    objective = Ddpm(options, v_prediction=False, device=CPU)
    losses = []
    for seed, timestep in enumerate((100, 300, 500, 700)):
        torch.manual_seed(seed)
        with torch.no_grad():
            losses.append(denoising_loss(family, objective, batch, torch.full((12,), timestep)).mean())
    return torch.stack(losses).mean().item()


def test_training_lowers_the_loss_on_fixed_noise_by_the_stated_factor(tmp_path):
    before = loss_on_fixed_noise(family_of())
    train(
        tiny.arguments(
            BASE, PICTURES, tmp_path / "out", resolution=128, enable_bucket=False, train_batch_size=4, network_dim=8,
            network_alpha=8, learning_rate=5e-3, max_train_epochs=6,
        )
    )  # fmt: skip
    options = dict(network_dim=8, network_weights=str(tmp_path / "out" / "lora.safetensors"))
    family = family_of(**options)
    build_network(lora, family, family.options, {}).eval()
    assert loss_on_fixed_noise(family) < before / FACTOR


@pytest.mark.parametrize(
    ("prompt", "rgb"),
    [
        ("a big red heart on a white background", (214, 40, 40)),
        ("a big blue circle on a yellow background", (50, 100, 215)),
        ("a big green tree on a pink background", (60, 160, 70)),
    ],
)
def test_the_base_draws_the_colour_that_was_asked_for(prompt, rgb):
    family = family_of()
    picture = draw(family, SamplePrompt(prompt, width=128, height=128, sample_steps=20, scale=5.0, seed=1), "ddim")
    pixels = torch.tensor(np.asarray(picture), dtype=torch.float32).reshape(-1, 3)
    near = (pixels - torch.tensor(rgb, dtype=torch.float32)).abs().amax(dim=1) < 60
    assert near.float().mean() > 0.05


def test_the_base_is_small_and_has_the_layout_of_sd_1():
    files = [path for path in BASE.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 12.5e6
    targets = list(family_of().adapter_targets(conv=False))
    assert len([target for target in targets if target.part == "unet"]) == 192, "as many as in SD 1.5"
