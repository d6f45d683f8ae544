"""Pictures held out of training, the loss on them, and outputs that are to stay as they were."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from library.dataset.config import DatasetSpec, SubsetOptions
from library.dataset.scan import ImageRecord, ScannedDataset
from library.dataset.validation import split_records, split_validation
from library.errors import UserError
from library.options.groups import TrainNetworkOptions
from library.training.denoising import Ddpm, denoising_loss, scaled_latents
from library.training.validation import validation_timesteps
from networks.lora import create_network
from tests import tiny
from tests.results import curves, metadata_of, weights_equal
from tests.test_denoising import batch
from train_network import train

SPEC = DatasetSpec(
    resolution="64,64",
    batch_size=1,
    enable_bucket=False,
    min_bucket_reso=64,
    max_bucket_reso=64,
    bucket_reso_steps=64,
    bucket_no_upscale=False,
    resize_interpolation=None,
)


def records(count: int, subset: int = 0) -> list[ImageRecord]:
    return [ImageRecord(f"{i:02d}.png", (64, 64), "", True, subset) for i in range(count)]


def names(found: list[ImageRecord]) -> list[str]:
    return [record.path.stem for record in found]


def scanned(*subsets: tuple[SubsetOptions, int], split: float, seed: int | None = 3) -> ScannedDataset:
    all_records = [record for index, (_, count) in enumerate(subsets) for record in records(count, index)]
    num_datasets = 1 + max(subset.dataset for subset, _ in subsets)
    specs = [replace(SPEC, validation_split=split, validation_seed=seed)] * num_datasets
    return ScannedDataset([subset for subset, _ in subsets], all_records, [], specs)


@pytest.mark.parametrize(("count", "share", "num_held_out"), [(10, 0.1, 1), (10, 0.25, 2), (5, 0.1, 0), (3, 1.0, 3)])
def test_the_held_out_pictures_are_those_of_a_shuffle_by_seed(count, share, num_held_out):
    train_part, held_out = split_records(records(count), share, 42)
    shuffled = names(records(count))
    random.seed(42)
    random.shuffle(shuffled)
    assert sorted(names(train_part)) == sorted(shuffled[: count - num_held_out])
    assert sorted(names(held_out)) == sorted(shuffled[count - num_held_out :])


def test_regularisation_pictures_are_all_trained():
    reg = SubsetOptions(image_dir=Path("reg"), is_reg=True)
    train_part, held_out = split_validation(scanned((SubsetOptions(image_dir=Path("a")), 4), (reg, 4), split=0.5), None)
    assert [record.subset for record in train_part.records] == [0, 0, 1, 1, 1, 1]
    assert [record.subset for record in held_out.records] == [0, 0]


def test_a_folder_in_two_datasets_has_the_same_pictures_held_out():
    twice = [(SubsetOptions(image_dir=Path("a"), dataset=number), 9) for number in (0, 1)]
    _, held_out = split_validation(scanned(*twice, split=0.3, seed=None), seed=8)
    first, second = ([r for r in held_out.records if r.subset == number] for number in (0, 1))
    assert names(first) == names(second) and len(first) == 2


def test_held_out_pictures_are_seen_the_same_way_every_time():
    moving = SubsetOptions(
        image_dir=Path("a"), num_repeats=5, shuffle_caption=True, flip_aug=True, color_aug=True, random_crop=True,
        caption_dropout_rate=0.5, caption_tag_dropout_rate=0.5, token_warmup_step=9, caption_prefix="photo of",
    )  # fmt: skip
    _, held_out = split_validation(scanned((moving, 4), split=0.5), None)
    assert held_out.subsets == [SubsetOptions(image_dir=Path("a"), caption_prefix="photo of")]


def test_nothing_left_to_train_is_a_mistake():
    with pytest.raises(UserError, match="leaves no pictures to train"):
        split_validation(scanned((SubsetOptions(image_dir=Path("a")), 4), split=1.0), None)


def test_a_share_too_small_for_one_picture_is_said():
    train_part, held_out = split_validation(scanned((SubsetOptions(image_dir=Path("a")), 4), split=0.1), None)
    assert held_out is None and "holds out none" in train_part.notes[0]


def test_the_share_that_leaves_nothing_is_named_by_its_place(tiny_file, pictures, tmp_path):
    folder = pictures / "2_cat"
    config = tmp_path / "data.toml"
    subsets = f"[[datasets.subsets]]\nimage_dir = '{folder}'\n"
    config.write_text(f"[[datasets]]\nvalidation_split = 1.0\n{subsets}", "utf-8")
    with pytest.raises(UserError, match=r"data\.toml: validation_split of datasets\[0\] leaves no pictures to train"):
        train(tiny.arguments(tiny_file, pictures, tmp_path / "out", train_data_dir=None, dataset_config=config))


def test_a_share_too_small_is_not_told_as_if_there_were_none(tiny_file, pictures, tmp_path, capsys):
    flags = dict(validation_split=0.01, validation_seed=3, debug_dataset=True)
    train(tiny.arguments(tiny_file, pictures, tmp_path / "out", **flags))
    said = capsys.readouterr().err
    assert "--validation_seed has no effect: no pictures are held out" in said
    assert "without --validation_split" not in said


def test_timesteps_divide_the_range():
    assert validation_timesteps(TrainNetworkOptions()) == [200, 400, 600, 800]
    assert validation_timesteps(TrainNetworkOptions(min_timestep=100, max_timestep=600)) == [200, 300, 400, 500]


def run(tiny_file, pictures, folder: Path, **changes) -> tuple[dict, Path]:
    settings = dict(max_train_epochs=2, validation_split=0.25, validation_seed=1, learning_rate=1e-2)
    train(tiny.arguments(tiny_file, pictures, folder, logging_dir=folder / "logs", **settings | changes))
    return curves(folder / "logs"), folder / "lora.safetensors"


@pytest.mark.parametrize("cached", [True, False])
def test_a_run_logs_the_validation_loss_and_trains_the_same(model_file, pictures, tmp_path, cached):
    seldom, reference = run(model_file, pictures, tmp_path / "a", cache_latents=cached, validate_every_n_epochs=9)
    assert not any("validation" in tag for tag in seldom)
    logged, file = run(model_file, pictures, tmp_path / "b", cache_latents=cached, validate_every_n_steps=2)
    steps = [step for step, _ in logged["loss/validation/step_average"]]
    assert steps == list(range(2, max(step for step, _ in logged["loss/current"]) + 1, 2))
    assert [epoch for epoch, _ in logged["loss/validation/epoch_average"]] == [1, 2]
    average, divergence = (logged[f"loss/validation/epoch_{name}"][-1][1] for name in ("average", "divergence"))
    assert average - divergence == pytest.approx(logged["loss/epoch_average"][-1][1], rel=1e-4)
    assert weights_equal(file, reference)
    assert metadata_of(file)["ss_num_validation_images"] == "1"


def test_without_learning_the_validation_loss_stays_where_it_is(tiny_file, pictures, tmp_path):
    settings = dict(learning_rate=1e-30, validation_split=0.5, network_dropout=0.5)
    logged, _ = run(tiny_file, pictures, tmp_path, **settings)
    losses = [loss for _, loss in logged["loss/validation/epoch_average"]]
    assert len(losses) == 2 and losses[0] == losses[1]
    limited, _ = run(tiny_file, pictures, tmp_path / "limited", **settings, max_validation_steps=1)
    assert limited["loss/validation/epoch_average"][0][1] != losses[0]


def test_a_preserved_row_learns_what_the_model_without_the_network_predicts(model_file):
    options = TrainNetworkOptions(pretrained_model_name_or_path=str(model_file))
    family = tiny.load_family(options)
    objective = Ddpm(options, v_prediction=False, device=torch.device("cpu"))
    torch.manual_seed(2)
    network = create_network(list(family.adapter_targets(conv=False)), 4, 4)
    for adapter in network.adapters():
        torch.nn.init.normal_(adapter.lora_up.weight, std=0.1)
    network.apply_to()
    timesteps = torch.tensor([300, 600])

    class Off:
        def __enter__(self):
            network.set_multiplier(0.0)

        def __exit__(self, *_):
            network.set_multiplier(1.0)

    def losses(rows: list[int]) -> torch.Tensor:
        torch.manual_seed(4)
        return denoising_loss(family, objective, batch(preserved_rows=rows), timesteps, network_off=Off)

    torch.manual_seed(4)
    noise = torch.randn_like(batch().latents)
    noisy = objective.add_noise(scaled_latents(family, batch()), noise, timesteps)
    conds = family.conds(batch())
    with torch.no_grad():
        trained = family.predict(noisy, timesteps, conds)
        network.remove()
        base = family.predict(noisy, timesteps, conds)
    network.apply_to()
    towards_noise = ((trained - noise) ** 2).mean(dim=(1, 2, 3))
    towards_base = ((trained - base) ** 2).mean(dim=(1, 2, 3))
    found = losses([1])
    torch.testing.assert_close(found.detach(), torch.stack([towards_noise[0], towards_base[1]]))
    torch.testing.assert_close(losses([0, 1]).detach(), towards_base)
    found[1].backward()
    assert all(adapter.lora_up.weight.grad.abs().sum() > 0 for adapter in network.adapters() if adapter.part == "unet")


@pytest.mark.parametrize("preserve", [True, False])
def test_a_new_network_has_nothing_to_learn_where_outputs_are_preserved(tiny_file, pictures, tmp_path, preserve):
    config = {
        "general": {"custom_attributes": {"diff_output_preservation": preserve}},
        "datasets": [{"resolution": 64, "subsets": [{"image_dir": str(next(pictures.iterdir()))}]}],
    }
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    logged, _ = run(tiny_file, pictures, tmp_path, dataset_config=path, max_train_epochs=1, validation_split=0)
    assert (max(loss for _, loss in logged["loss/current"]) == 0) == preserve
