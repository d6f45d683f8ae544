"""The parts of a model are read when they are needed, no earlier, and are whole before."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from library.errors import UserError
from library.families.checkpoint_files import Target
from library.families.checkpoints import open_models
from library.families.detect import inspect_checkpoint
from library.families.parts import LoadedPart, Part
from library.options.cli import read_options
from library.options.groups import ModelOptions, TrainNetworkOptions
from library.recipes.network import load_family
from tests import tiny
from train_network import train

CPU = Target(torch.float32)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """Every reading of weights in its order: of what, and what else is in memory then."""
    parts: dict[str, Part] = {}
    found = []
    check, fill = Part._check, Part._fill

    def noted_check(part: Part, what: str) -> None:
        parts[what] = part
        check(part, what)

    def noted_fill(part: Part, target: Target) -> None:
        name = next(name for name, other in parts.items() if other is part)
        found.append((name, [other for other, one in parts.items() if one._is_filled]))
        fill(part, target)

    monkeypatch.setattr(Part, "_check", noted_check)
    monkeypatch.setattr(Part, "_fill", noted_fill)
    return found


def opened(path: Path, **options: object):
    return open_models(inspect_checkpoint(str(path)), ModelOptions(**options))


@pytest.mark.parametrize("more", [{}, {"base_quantization": "nf4"}, {"fp8_base_unet": True}])
def test_each_part_has_left_before_the_unet_comes(more, tiny_sdxl_file, pictures, tmp_path, loads):
    words = dict(network_train_unet_only=True, max_train_steps=1, **more)
    train(tiny.arguments(tiny_sdxl_file, pictures, tmp_path / "out", **words))
    assert loads == [
        ("VAE", []),
        ("CLIP text encoder", []),
        ("OpenCLIP text encoder", ["CLIP text encoder"]),
        ("Stable Diffusion U-Net", []),
    ]


def test_text_encoders_that_are_trained_stay(tiny_file, pictures, tmp_path, loads):
    train(tiny.arguments(tiny_file, pictures, tmp_path / "out", max_train_steps=1))
    assert [name for name, _ in loads] == ["VAE", "Stable Diffusion U-Net", "CLIP text encoder"]


def test_only_the_unet_is_read_where_all_else_is_on_disk_and_taken_as_it_is(tiny_sdxl_file, pictures, tmp_path, loads):
    options = dict(
        network_train_unet_only=True, max_train_steps=1, cache_latents_to_disk=True,
        cache_text_encoder_outputs_to_disk=True,
    )  # fmt: skip
    train(tiny.arguments(tiny_sdxl_file, pictures, tmp_path / "out", **options))
    loads.clear()
    train(tiny.arguments(tiny_sdxl_file, pictures, tmp_path / "out", skip_cache_check=True, **options))
    assert loads == [("Stable Diffusion U-Net", [])]


@pytest.mark.parametrize("change", ["missing", "misshapen"])
@pytest.mark.parametrize("form", ["file", "folder"])
def test_a_broken_part_is_found_before_any_is_read(form, change, tiny_file, tmp_path, loads):
    path = tiny.write_folder(tmp_path / "model") if form == "folder" else tmp_path / "model.safetensors"
    file = path / "unet" / "diffusion_pytorch_model.safetensors" if form == "folder" else path
    weights = load_file(file if form == "folder" else tiny_file)
    name = next(name for name in weights if name.endswith("conv_out.bias") or name.endswith("out.2.bias"))
    weights |= {name: torch.zeros(9)}
    if change == "missing":
        del weights[name]
    save_file(weights, file)
    with pytest.raises(UserError, match={"missing": "missing", "misshapen": "size|shape"}[change]):
        opened(path)
    assert not loads


@pytest.mark.parametrize("form", ["file", "folder"])
def test_a_part_that_was_released_comes_back_as_it_was(form, tiny_sd2_file, tmp_path):
    models = opened(tiny.write_folder(tmp_path / "model", "sd2") if form == "folder" else tiny_sd2_file)
    for part in (models.unet, models.vae, *models.text_encoders):
        first = {name: value.clone() for name, value in part.loaded(CPU).state_dict().items()}
        part.release()
        assert {value.device.type for value in part.layers.state_dict().values()} == {"meta"}
        again = part.loaded(CPU)
        assert again is part.layers and not again.training
        assert all(torch.equal(value, first[name]) for name, value in again.state_dict().items())
        assert not any(parameter.requires_grad for parameter in again.parameters())


def test_changed_weights_are_kept(tiny_file):
    part = opened(tiny_file).unet
    part.loaded(CPU).conv_in.bias.data.fill_(7)
    part.keep()
    part.release()
    assert (part.loaded(CPU).conv_in.bias == 7).all()


def test_a_folder_with_the_names_of_older_classes_is_left_to_diffusers(tmp_path):
    folder = tiny.write_folder(tmp_path / "model")
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = load_file(file)
    for new, old in older.items():
        weights = {name.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): v for name, v in weights.items()}
    save_file(weights, file, {"format": "pt"})
    part = opened(folder).vae
    assert isinstance(part, LoadedPart)
    vae = part.loaded(Target(torch.bfloat16))
    assert isinstance(vae, AutoencoderKL)
    wanted = tiny.models().vae.state_dict()
    assert all(torch.equal(value, wanted[name].bfloat16()) for name, value in vae.state_dict().items())


def test_base_weights_are_merged_into_weights_that_stay(tiny_file, pictures, tmp_path):
    arguments = tiny.arguments(tiny_file, pictures, tmp_path / "out", max_train_steps=1)
    train(arguments)
    network = tmp_path / "out" / "lora.safetensors"
    options = read_options(TrainNetworkOptions, [*arguments, "--base_weights", str(network)])
    family = load_family(options, "sd", torch.device("cpu"))
    assert isinstance(family.unet, UNet2DConditionModel)
    before = family.prompt_conds("a", "")["hidden"]
    family.remember_text(["a"], lambda: None)
    assert torch.equal(family.prompt_conds("a", "")["hidden"], before)
