"""Caches that the scripts fill are those that training reads: it finds them valid, and loads what it needs no more."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from library.dataset.cache import read_latents
from library.errors import UserError
from library.families.parts import Part
from tests import tiny
from tools.cache_latents import main as cache_latents
from tools.cache_text_encoder_outputs import main as cache_text
from tools.prepare_buckets_latents import main as prepare_buckets_latents
from train_network import train


@pytest.fixture
def loaded(monkeypatch) -> list[str]:
    """The classes of the models whose weights are read, as it happens."""
    names, fill = [], Part._fill

    def recorded(part: Part, *arguments: object) -> None:
        names.append(type(part.layers).__name__)
        fill(part, *arguments)

    monkeypatch.setattr(Part, "_fill", recorded)
    return names


def training_words(model: Path, pictures: Path, out: Path, **more: object) -> list[str]:
    return tiny.arguments(model, pictures, out, cache_latents=False, network_train_unet_only=True, **more)


def caching_words(model: Path, pictures: Path, **more: object) -> list[str]:
    """What a user gives the caching scripts: the same without what is of the network and of its files."""
    sizes = dict(resolution="96,96", min_bucket_reso=64, max_bucket_reso=128, caption_extension=".txt")
    given = dict(pretrained_model_name_or_path=model, train_data_dir=pictures, **sizes, **more)
    words = [word for name, value in given.items() if value is not True for word in (f"--{name}", str(value))]
    return [*words, "--enable_bucket", *(f"--{name}" for name, value in given.items() if value is True)]


def found(capsys) -> list[str]:
    """What was said since the last question of files that are on disk."""
    return re.findall(r"(?:latents|text encoder outputs): \d+ of .*", capsys.readouterr().err)


def test_training_after_the_scripts_loads_neither_vae_nor_encoders(tiny_sdxl_file, pictures, tmp_path, loaded, capsys):
    words = caching_words(tiny_sdxl_file, pictures, sdxl=True)
    cache_latents(words)
    assert set(loaded) == {"AutoencoderKL"}
    loaded.clear()
    cache_text(words)
    assert "AutoencoderKL" not in loaded and "UNet2DConditionModel" not in loaded
    assert len(list(pictures.rglob("*_sdxl.npz"))) == len(list(pictures.rglob("*_te_outputs.npz"))) == 4
    loaded.clear()
    capsys.readouterr()
    caches = dict(cache_latents_to_disk=True, cache_text_encoder_outputs_to_disk=True)
    train(training_words(tiny_sdxl_file, pictures, tmp_path / "out", **caches))
    assert loaded == ["UNet2DConditionModel"]
    assert found(capsys) == [
        "latents: 4 of 4 pictures have theirs on disk",
        "text encoder outputs: 4 of 4 pictures have theirs on disk",
    ]


def test_a_second_run_makes_what_changed_alone_and_existing_files_can_be_trusted(tiny_file, pictures, loaded, capsys):
    words = caching_words(tiny_file, pictures)
    cache_latents(words)
    path = min(pictures.rglob("*_sd.npz"))
    path.write_bytes(b"damaged")
    capsys.readouterr()
    cache_latents([*words, "--skip_existing"])
    assert found(capsys) == ["latents: 4 of 4 pictures have theirs on disk"]
    assert path.read_bytes() == b"damaged"
    capsys.readouterr()
    cache_latents(words)
    assert found(capsys) == ["latents: 3 of 4 pictures have theirs on disk; made anew: 1 damaged"]
    assert read_latents(path).latents.shape[0] == 4


def test_a_configuration_file_of_training_serves_and_held_out_pictures_are_cached_too(tiny_file, pictures, tmp_path):
    config = tmp_path / "我的 lora.toml"
    values = dict(
        pretrained_model_name_or_path=str(tiny_file), train_data_dir=str(pictures), resolution="64",
        caption_extension=".txt", output_dir=str(tmp_path / "out"), learning_rate=1e-4, validation_split=0.5,
    )  # fmt: skip
    config.write_text("\n".join(f"{name} = {json.dumps(value)}" for name, value in values.items()), encoding="utf-8")
    cache_latents(["--config_file", str(config)])
    assert len(list(pictures.rglob("*_sd.npz"))) == 4
    assert not (tmp_path / "out").exists()


def test_text_is_cached_of_encoders_in_fp8_where_training_has_them_so(tiny_sdxl_file, pictures):
    path, common = next(pictures.rglob("*.txt")), dict(sdxl=True, mixed_precision="bf16")
    path = path.with_name(f"{path.stem}_te_outputs.npz")

    def text(*words: str) -> np.ndarray:
        cache_text([*caching_words(tiny_sdxl_file, pictures, **common), *words])
        with np.load(path) as file:
            found = file["hidden_state1"]
        path.unlink()
        return found

    whole = text()
    assert not np.array_equal(text("--fp8_base"), whole)
    assert np.array_equal(text("--fp8_base", "--fp8_base_unet"), whole)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--sdxl"], "is a Stable Diffusion 1.x"),
        (["--flux"], "--flux is not supported"),
        (["--dry_run"], "--dry_run is for the training script"),
        (["--random_crop"], "--cache_latents_to_disk does not go with --random_crop"),
    ],
)
def test_mistakes_are_found_before_anything_is_written(words, sentence, tiny_file, pictures):
    with pytest.raises(UserError, match=sentence):
        cache_latents([*caching_words(tiny_file, pictures), *words])
    assert not list(pictures.rglob("*.npz"))


def test_text_of_models_without_files_is_refused_and_flags_of_other_models_are_named(tiny_file, pictures, capsys):
    with pytest.raises(UserError, match="have no files, every run computes them when it starts"):
        cache_text(caching_words(tiny_file, pictures))
    cache_latents([*caching_words(tiny_file, pictures), "--guidance_scale", "2", "--unet_lr", "1", "--seed", "3"])
    said = capsys.readouterr().err
    assert "--guidance_scale has no effect: it is for models that this suite does not train" in said
    assert "without effect, as nothing is trained here: --unet_lr\n" in said


def test_buckets_go_into_the_metadata_and_training_reads_both(tiny_file, pictures, tmp_path, capsys):
    folder, given, out = pictures / "2_cat", tmp_path / "meta.json", tmp_path / "buckets.json"
    given.write_text(json.dumps({"picture 0": {"caption": "older key"}}), encoding="utf-8")
    sizes = ["--max_resolution", "96,96", "--min_bucket_reso", "64", "--max_bucket_reso", "128"]
    prepare_buckets_latents([str(folder), str(given), str(out), str(tiny_file), *sizes, "--flip_aug"])
    entries = json.loads(out.read_text(encoding="utf-8"))
    assert set(entries) == {"picture 0", "picture 1.png", "picture 2.png", "picture 3.png"}
    assert entries["picture 0"] == {"caption": "older key", "image_size": [128, 64], "train_resolution": [128, 64]}
    for path in folder.glob("*_sd.npz"):
        with np.load(path) as file:
            assert {"latents", "latents_flipped"} <= set(file)
    assert entries["picture 1.png"]["train_resolution"] == [64, 64]
    capsys.readouterr()
    more = dict(in_json=out, cache_latents_to_disk=True, flip_aug=True, caption_extension=None)
    train(training_words(tiny_file, folder, tmp_path / "out", **more))
    assert found(capsys) == ["latents: 4 of 4 pictures have theirs on disk"]
    with pytest.raises(UserError, match="^--max_resolution must be a size"):
        prepare_buckets_latents([str(folder), str(given), str(out), str(tiny_file), "--max_resolution", "big"])
