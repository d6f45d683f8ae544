"""Masks weigh the loss: from transparency or from mask pictures, cut and mirrored with their pictures, also cached."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from library.dataset.cache import read_latents
from library.dataset.dataset import Example, TrainingDataset, collate
from library.dataset.sampler import Draw
from library.dataset.scan import as_decoded, scan_dataset, verify_pictures
from library.errors import UserError
from library.options.groups import DatasetOptions, TrainNetworkOptions
from library.training.denoising import resized_masks
from tests import tiny
from train_network import train


@pytest.fixture
def half_transparent(tmp_path: Path) -> Path:
    """Two pictures whose left half is transparent, and one of two that is opaque, in `train/1_cat`."""
    folder = tmp_path / "train" / "1_cat"
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 4), dtype=np.uint8)
    pixels[..., 3] = 255
    Image.fromarray(pixels[..., :3]).save(folder / "opaque.png")
    pixels[:, :32, 3] = 0
    Image.fromarray(pixels).save(folder / "half.png")
    return tmp_path


def dataset_of(folder: Path, **more) -> TrainingDataset:
    options = TrainNetworkOptions(
        train_data_dir=str(folder / "train"), resolution="64", train_batch_size=2, enable_bucket=False, **more
    )
    return TrainingDataset(scan_dataset(options), options, seed=0, max_train_steps=4)


def example(dataset: TrainingDataset, name: str, seed: int = 0):
    index = next(i for i, record in enumerate(dataset.scanned.records) if record.path.name == name)
    return dataset[Draw(index, seed, epoch=1, step=0)]


def seed_that_flips(dataset: TrainingDataset, name: str) -> int:
    return next(seed for seed in range(50) if example(dataset, name, seed).alpha_mask[0, 0] == 1)


def test_transparency_is_the_mask_and_opaque_pictures_count_in_full(half_transparent):
    dataset = dataset_of(half_transparent, alpha_mask=True)
    mask = example(dataset, "half.png").alpha_mask
    assert mask.shape == (64, 64) and not mask[:, :32].any() and (mask[:, 32:] == 1).all()
    assert (example(dataset, "opaque.png").alpha_mask == 1).all()


@pytest.mark.parametrize("palette", [False, True])
def test_pictures_without_transparency_are_counted(palette, half_transparent):
    folder = half_transparent / "train" / "1_cat"
    Image.new("RGBA", (64, 64)).save(folder / "clear.png")
    Image.open(folder / "opaque.png").convert("RGBA").save(folder / "opaque with alpha.png")
    if palette:
        for path in sorted(folder.iterdir()):
            Image.open(path).quantize(16).save(path)
    for alpha_mask, expected in ((True, ["2 of 4 pictures"]), (False, [])):
        scanned = dataset_of(half_transparent, alpha_mask=alpha_mask).scanned
        notes = as_decoded(scanned, verify_pictures(scanned.records)).notes
        said = [re.search("alpha_mask has no effect on (.*) of .*1_cat", note) for note in notes]
        assert [match[1] for match in said if match] == expected


def test_without_the_option_there_is_no_mask(half_transparent):
    dataset = dataset_of(half_transparent)
    assert example(dataset, "half.png").alpha_mask is None
    assert collate([example(dataset, "half.png")]).alpha_masks is None


def test_a_mask_is_mirrored_with_its_picture(half_transparent):
    dataset = dataset_of(half_transparent, alpha_mask=True, flip_aug=True)
    mask = example(dataset, "half.png", seed_that_flips(dataset, "half.png")).alpha_mask
    assert (mask[:, :32] == 1).all() and not mask[:, 32:].any()


def test_a_mask_is_cut_where_its_picture_is_cut(tmp_path):
    folder = tmp_path / "train" / "1_cat"
    folder.mkdir(parents=True)
    ramp = np.repeat(np.arange(128, dtype=np.uint8)[None, :, None], 64, axis=0)
    Image.fromarray(np.concatenate([ramp, ramp, ramp, ramp], axis=2), "RGBA").save(folder / "ramp.png")
    dataset = dataset_of(tmp_path, alpha_mask=True, random_crop=True)
    masks = [example(dataset, "ramp.png", seed).alpha_mask for seed in range(6)]
    starts = {round(mask[0, 0].item() * 255) for mask in masks}
    assert len(starts) > 1
    for mask in masks:
        torch.testing.assert_close(mask[0] * 255, mask[0, 0] * 255 + torch.arange(64.0))


def write_masks(folder: Path) -> Path:
    masks = folder / "masks"
    masks.mkdir()
    for name in ("half", "opaque"):
        red = np.zeros((64, 64, 3), np.uint8)
        red[:16, :, 0] = 255
        red[..., 1] = 99  # only the red channel counts
        Image.fromarray(red).save(masks / f"{name}.png")
    return masks


def test_a_mask_picture_counts_by_its_red_channel(half_transparent):
    masks = write_masks(half_transparent)
    dataset = dataset_of(half_transparent, masked_loss=True, conditioning_data_dir=str(masks))
    mask = example(dataset, "opaque.png").alpha_mask
    assert (mask[:16] == 1).all() and not mask[16:].any()


def test_transparency_beside_mask_pictures_is_told_to_have_no_effect(half_transparent):
    masks = write_masks(half_transparent)
    dataset = dataset_of(half_transparent, masked_loss=True, conditioning_data_dir=str(masks), alpha_mask=True)
    assert any("alpha_mask has no effect on" in note for note in dataset.scanned.notes)


def test_pictures_without_a_mask_are_named(half_transparent):
    masks = write_masks(half_transparent)
    (masks / "half.png").unlink()
    with pytest.raises(UserError, match="no mask for half.png"):
        dataset_of(half_transparent, masked_loss=True, conditioning_data_dir=str(masks))


def test_a_folder_of_masks_that_is_not_there_is_named_with_its_flag():
    options = TrainNetworkOptions(train_data_dir="x", resolution="96", masked_loss=True, conditioning_data_dir="none")
    assert DatasetOptions.check(options) == ["--conditioning_data_dir: there is no folder none"]


def test_where_only_some_pictures_of_a_batch_have_masks_the_others_count_in_full():
    whole = dict(caption="", loss_weight=1.0, image=torch.zeros(3, 8, 16), latents=None)
    sizes = dict(original_size_hw=(8, 16), crop_top_left=(0, 0), target_size_hw=(8, 16))
    masked = Example(**whole, **sizes, alpha_mask=torch.zeros(8, 16))
    batch = collate([masked, Example(**whole, **sizes, alpha_mask=None)])
    assert batch.alpha_masks.shape == (2, 8, 16)
    assert not batch.alpha_masks[0].any() and (batch.alpha_masks[1] == 1).all()


def test_the_loss_gets_the_mean_of_the_mask_over_each_latent_cell():
    mask = torch.zeros(1, 16, 16)
    mask[0, :8, :4] = 1  # half of the first cell of 8x8
    resized = resized_masks(mask, torch.zeros(1, 4, 2, 2))
    assert torch.equal(resized, torch.tensor([[[[0.5, 0.0], [0.0, 0.0]]]]))


def test_a_mask_of_nothing_trains_nothing_and_one_of_everything_changes_nothing(tiny_folder, tmp_path):
    pictures = tiny.write_pictures(tmp_path / "train", count=2)
    results = {}
    for name, value in (("none", 0), ("all", 255)):
        masks = tmp_path / name
        masks.mkdir()
        for path in (pictures / "2_cat").glob("*.png"):
            Image.new("RGB", Image.open(path).size, (value, 0, 0)).save(masks / path.name)
        options = dict(masked_loss=True, conditioning_data_dir=masks, optimizer_args=["weight_decay=0"])
        train(tiny.arguments(tiny_folder, pictures, tmp_path / f"out {name}", **options))
        results[name] = load_file(tmp_path / f"out {name}" / "lora.safetensors")
    train(tiny.arguments(tiny_folder, pictures, tmp_path / "plain", optimizer_args=["weight_decay=0"]))
    plain = load_file(tmp_path / "plain" / "lora.safetensors")
    assert not any(value.any() for key, value in results["none"].items() if "lora_up" in key)
    assert all(torch.equal(plain[key], value) for key, value in results["all"].items())


def test_masks_are_kept_in_latent_files_and_a_file_without_one_is_made_anew(tiny_folder, half_transparent):
    pictures, output = half_transparent / "train", half_transparent / "out"
    (file,) = [pictures / "1_cat" / "half_0064x0064_sd.npz"]
    train(tiny.arguments(tiny_folder, pictures, output, cache_latents_to_disk=True))
    assert read_latents(file).alpha_mask is None
    train(tiny.arguments(tiny_folder, pictures, output, cache_latents_to_disk=True, alpha_mask=True))
    mask = read_latents(file).alpha_mask
    assert mask.shape == (64, 64) and not mask[:, :32].any() and (mask[:, 32:] == 1).all()


def test_masked_loss_without_masks_says_that_it_has_no_effect(tiny_file, pictures, tmp_path, capsys):
    train(tiny.arguments(tiny_file, pictures, tmp_path / "out", masked_loss=True))
    assert "--masked_loss has no effect" in capsys.readouterr().err
