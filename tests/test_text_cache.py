"""Text encoder outputs in kohya's files: training is the same with them, and files that do not fit are made anew."""

import logging
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from library.dataset.dataset import TrainingDataset, collate
from library.dataset.scan import scan_dataset
from library.errors import UserError
from library.families.sdxl import Sdxl
from library.options.groups import TrainNetworkOptions
from library.training.text_caching import cache_text_on_disk
from tests import tiny
from tests.results import scalars, weights_equal
from train_network import train

SIZES = dict(resolution="64,64", enable_bucket=False, caption_extension=".txt")
ALL_FOUND = "text encoder outputs: 4 of 4 pictures have theirs on disk"


@pytest.fixture
def cache(tiny_sdxl_file, pictures, caplog):
    """Cache the captions of a run; returns its dataset, its family, and the line that says what was found."""

    def run(model: Path = tiny_sdxl_file, dtype=torch.float32, **changes: object) -> tuple[TrainingDataset, Sdxl, str]:
        options = TrainNetworkOptions(pretrained_model_name_or_path=str(model), train_data_dir=str(pictures), **SIZES)
        options = replace(options, **changes)
        dataset = TrainingDataset(scan_dataset(options), options, seed=0, max_train_steps=4)
        family = Sdxl(options, torch.device("cpu"), dtype)
        caplog.clear()
        with caplog.at_level(logging.INFO):
            cache_text_on_disk([dataset], family, options, Accelerator(cpu=True))
        return dataset, family, next(m for m in caplog.messages if m.startswith("text encoder outputs:"))

    return run


@pytest.fixture
def other_model(tiny_sdxl_file, tmp_path) -> Path:
    """The same but for the first text encoder."""
    weights = load_file(tiny_sdxl_file)
    name = "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight"
    save_file(weights | {name: weights[name].roll(1, 1).contiguous()}, tmp_path / "other.safetensors")
    return tmp_path / "other.safetensors"


def files(pictures: Path) -> list[Path]:
    return sorted((pictures / "2_cat").glob("*_te_outputs.npz"))


def contents(pictures: Path) -> list[bytes]:
    return [path.read_bytes() for path in files(pictures)]


def as_kohya_writes_them(pictures: Path, dtype: type = np.float32) -> None:
    """The files with kohya's keys alone."""
    for path in files(pictures):
        with np.load(path) as file:
            arrays = {name: file[name].astype(dtype) for name in file if not name.startswith("athanor_")}
        np.savez(path, **arrays)


@torch.no_grad()
def are_right(dataset: TrainingDataset, family: Sdxl, tolerance: float = 0.0) -> bool:
    """Whether every example brings what the text encoders make of its caption as it is now."""
    for batch in [collate([dataset[draw] for draw in draws]) for draws in dataset.sampler()]:
        found, right = family.conds(batch), family.encode_text(batch.captions)
        if batch.conds is None or any((found[name] - right[name]).abs().max() > tolerance for name in right):
            return False
    return True


def test_files_have_kohyas_names_keys_shapes_and_types_and_three_keys_of_our_own(cache, pictures):
    dataset, family, said = cache()
    assert said == "text encoder outputs: 0 of 4 pictures have theirs on disk"
    assert [path.name for path in files(pictures)] == [f"picture {n}_te_outputs.npz" for n in range(4)]
    with np.load(files(pictures)[0], allow_pickle=False) as file:
        arrays = {name: (file[name].dtype, file[name].shape) for name in file}
        hidden = torch.from_numpy(file["hidden_state1"])
    ours = {name for name in arrays if name.startswith("athanor_")}
    assert ours == {"athanor_caption", "athanor_encoders", "athanor_checksum"}
    assert {name: value for name, value in arrays.items() if name not in ours} == {
        "hidden_state1": (np.float32, (77, 32)),  # toy widths; 768, 1280 and 1280 in SDXL
        "hidden_state2": (np.float32, (77, 64)),
        "pool2": (np.float32, (64,)),
    }
    ids = family.tokenizers[0]("a cat, number 0", padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        states = family.text_encoders[0](ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(hidden, states[-2][0])
    assert are_right(dataset, family)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_run_with_files_is_a_run_with_outputs_in_memory_to_the_bit(precision, tiny_sdxl_file, pictures, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 2 --d 7\n", encoding="utf-8")
    for name, to_disk in (("memory", False), ("written", True), ("read", True)):
        train(
            tiny.arguments(
                tiny_sdxl_file, pictures, tmp_path / name, logging_dir=tmp_path / f"logs {name}", bucket_reso_steps=32,
                cache_text_encoder_outputs=True, cache_text_encoder_outputs_to_disk=to_disk, max_train_epochs=2,
                network_train_unet_only=True, mixed_precision=precision, validation_split=0.25, train_batch_size=2,
                sample_prompts=prompts, sample_every_n_epochs=2,
            )
        )  # fmt: skip
        if name == "written":
            before = contents(pictures)
        assert len(files(pictures)) == 4 * to_disk  # held-out pictures too
    assert contents(pictures) == before
    curves = [scalars(tmp_path / f"logs {name}") for name in ("memory", "written", "read")]
    losses = [(curve["loss/current"], curve["loss/validation/epoch_average"]) for curve in curves]
    assert losses[0] == losses[1] == losses[2]
    for name in ("written", "read"):
        assert weights_equal(tmp_path / "memory" / "lora.safetensors", tmp_path / name / "lora.safetensors")
    drawn = [next((tmp_path / name / "sample").glob("*.png")).read_bytes() for name in ("memory", "read")]
    assert drawn[0] == drawn[1]


def test_training_with_files_needs_no_text_encoders_and_trusted_files_are_not_read_before_it(cache, pictures):
    cache()
    dataset, family, said = cache()
    assert said == ALL_FOUND
    for encoder in family.text_encoders:
        encoder.to("meta")  # without its weights
    batch = collate([dataset[draw] for draw in next(iter(dataset.sampler()))])
    assert family.conds(batch)["hidden"].shape == (1, 77, 96)
    files(pictures)[0].write_bytes(b"damaged")
    dataset, _, said = cache(skip_cache_check=True)
    assert said == ALL_FOUND
    with pytest.raises(UserError, match=r"picture 0_te_outputs\.npz cannot be read"):
        [dataset[draw] for draws in dataset.sampler() for draw in draws]


def change_caption(pictures: Path, other_model: Path) -> dict:
    (pictures / "2_cat" / "picture 1.txt").write_text("a dog", encoding="utf-8")
    return {}


def damage(pictures: Path, other_model: Path) -> dict:
    files(pictures)[0].write_bytes(files(pictures)[0].read_bytes()[:-100])
    return {}


def exchange_kohyas_keys(pictures: Path, other_model: Path) -> dict:
    """Kohya replaces its keys and leaves ours, which then no longer count; and the caption is newer."""
    arrays = dict(np.load(files(pictures)[1]))
    np.savez(files(pictures)[1], **arrays | {"pool2": arrays["pool2"] + 1})
    os.utime(files(pictures)[1], (1, 1))
    return {}


CAUSES = {
    "1 of another caption": change_caption,
    "1 damaged": damage,
    "1 older than the caption or the picture": exchange_kohyas_keys,
    "4 made with other text encoders": lambda pictures, other_model: {"model": other_model},
    "4 of another length": lambda *_: {"max_token_length": 150},
    "4 of another caption": lambda *_: {"weighted_captions": True},
}


@pytest.mark.parametrize("cause", CAUSES)
def test_what_no_longer_fits_is_made_anew_and_the_cause_is_said(cause, cache, pictures, other_model):
    cache()
    changes = CAUSES[cause](pictures, other_model)
    dataset, family, said = cache(**changes)
    kept = 4 - int(cause[0])
    assert said == f"text encoder outputs: {kept} of 4 pictures have theirs on disk; made anew: {cause}"
    assert are_right(dataset, family)
    assert cache(**changes)[2] == ALL_FOUND


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_kohyas_files_are_taken_as_they_are(dtype, cache, pictures):
    cache()
    as_kohya_writes_them(pictures, dtype)
    before = contents(pictures)
    dataset, family, said = cache()
    assert said == ALL_FOUND and contents(pictures) == before
    assert are_right(dataset, family, tolerance=0.0 if dtype is np.float32 else 0.01)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kohyas", [False, True])
def test_the_same_encoders_are_known_in_another_number_format(dtype, kohyas, cache, pictures):
    cache(dtype=dtype)
    if kohyas:
        as_kohya_writes_them(pictures)
    assert cache()[2] == ALL_FOUND


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"caption_prefix": "photo of"}, "4 of another caption"),  # kohya encodes captions as they are
        ({"weighted_captions": True}, "4 of another caption"),
        ({}, "1 older than the caption or the picture"),
        ({"model": None}, "4 made with other text encoders"),
    ],
)
def test_kohyas_files_that_cannot_be_this_runs_are_made_anew(change, cause, cache, pictures, other_model):
    cache()
    as_kohya_writes_them(pictures)
    if not change:
        os.utime(pictures / "2_cat" / "picture 2.txt", (2e9, 2e9))
    dataset, family, said = cache(**change | ({"model": other_model} if "model" in change else {}))
    assert said.endswith(f"made anew: {cause}")
    assert are_right(dataset, family)


def test_one_picture_with_two_captions_has_one_file_and_both_captions(cache, pictures, tmp_path):
    config = tmp_path / "dataset.toml"
    folder = (pictures / "2_cat").as_posix()
    dataset = f"[[datasets]]\n[[datasets.subsets]]\nimage_dir = '{folder}'\ncaption_prefix = "
    config.write_text(f"{dataset}'one'\n{dataset}'two'\n", encoding="utf-8")
    for _ in range(2):
        dataset, family, _ = cache(dataset_config=str(config), train_data_dir=None)
        assert len(dataset.text_paths) == len(dataset.texts) == 4
        assert are_right(dataset, family, tolerance=1e-5)


@pytest.mark.parametrize("changes", [{"caption_dropout_rate": 0.1}, {"shuffle_caption": True}])
def test_captions_that_change_have_no_files(changes, tiny_sdxl_file, pictures, tmp_path):
    settings = dict(cache_text_encoder_outputs_to_disk=True, network_train_unet_only=True, bucket_reso_steps=32)
    with pytest.raises(UserError, match="--cache_text_encoder_outputs_to_disk does not go with captions that change"):
        train(tiny.arguments(tiny_sdxl_file, pictures, tmp_path / "out", **settings, **changes))


def test_other_models_keep_them_in_memory_and_say_so(tiny_file, pictures, tmp_path, capsys):
    settings = dict(cache_text_encoder_outputs_to_disk=True, network_train_unet_only=True, caption_dropout_rate=0.1)
    train(tiny.arguments(tiny_file, pictures, tmp_path / "out", **settings))
    assert capsys.readouterr().err.count("--cache_text_encoder_outputs_to_disk has no effect on this model") == 1
    assert not files(pictures)
