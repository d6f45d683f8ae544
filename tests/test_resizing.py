"""Smaller LoRA files: as near to what they come from as their ranks allow, by numpy's decomposition."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.adapters.base_model import open_base_model
from library.adapters.file import open_adapter
from library.errors import UserError
from library.network_files import content_hashes
from networks import extract_lora_from_dylora, extract_lora_from_models, resize_lora
from tests import tiny

QUERY = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
CONVOLUTION = "lora_unet_down_blocks_0_resnets_0_conv1"
TEXT = "lora_te_text_model_encoder_layers_1_self_attn_k_proj"


def run(script, *words: object) -> None:
    script.main([str(word) for word in words])


def delta(path: Path, name: str) -> Tensor:
    return open_adapter(path, "--model").layers[name].delta()


def rank(path: Path, name: str) -> int:
    return open_adapter(path, "--model").layers[name].rank


def least_error(exact: Tensor, rank: int) -> float:
    """Of any matrix of this rank, by numpy."""
    values = np.linalg.svd(exact.flatten(1).double().numpy(), compute_uv=False)
    return float(np.sqrt((values[rank:] ** 2).sum()))


def is_optimal(found: Tensor, exact: Tensor, rank: int) -> bool:
    error = float((found.flatten(1) - exact.flatten(1)).norm())
    return abs(error - least_error(exact, rank)) < 1e-3 * float(exact.norm())


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A LoRA of rank 8 with singular values that fall, and alpha 4."""
    torch.manual_seed(0)
    weights = {}
    for name, inside in ((QUERY, (32,)), (CONVOLUTION, (32, 3, 3))):
        weights[f"{name}.alpha"] = torch.tensor(4.0)
        weights[f"{name}.lora_down.weight"] = torch.randn(8, *inside) * 0.6 ** torch.arange(8).view(
            -1, *[1] * len(inside)
        )
        weights[f"{name}.lora_up.weight"] = torch.randn(32, 8, *[1] * (len(inside) - 1))
    metadata = {"ss_network_dim": "8", "ss_training_comment": "mine", "ss_output_name": "cat"}
    save_file(weights, tmp_path / "large.safetensors", metadata)
    return tmp_path / "large.safetensors"


def test_a_resized_lora_is_the_best_of_its_rank(large, tmp_path):
    small = tmp_path / "small 小.safetensors"
    run(resize_lora, "--model", large, "--new_rank", "3", "--new_conv_rank", "2", "--save_to", small)
    assert (rank(small, QUERY), rank(small, CONVOLUTION)) == (3, 2)
    assert is_optimal(delta(small, QUERY), delta(large, QUERY), 3)
    assert is_optimal(delta(small, CONVOLUTION), delta(large, CONVOLUTION), 2)
    file = open_adapter(small, "--model")
    assert file.layers[QUERY].alpha == 1.5  # alpha / rank stays
    assert load_file(small)[f"{CONVOLUTION}.lora_down.weight"].shape == (2, 32, 3, 3)
    assert file.metadata["ss_network_dim"] == "3" and file.metadata["ss_output_name"] == "cat"
    assert file.metadata["ss_training_comment"].endswith("; mine")
    assert content_hashes(load_file(small), file.metadata).items() <= file.metadata.items()


def by_ratio(values: np.ndarray, wanted: float) -> int:
    return int((values > values[0] / wanted).sum())


def by_share(values: np.ndarray, wanted: float) -> int:
    return next(n for n in range(1, len(values) + 1) if values[:n].sum() >= wanted * values.sum())


def by_norm(values: np.ndarray, wanted: float) -> int:
    return next(n for n in range(1, len(values) + 1) if np.linalg.norm(values[:n]) >= wanted * np.linalg.norm(values))


@pytest.mark.parametrize(
    ("method", "wanted", "rank_of"),
    [
        ("sv_ratio", 5, by_ratio),
        ("sv_ratio", 50, by_ratio),
        ("sv_cumulative", 0.7, by_share),
        ("sv_fro", 0.9, by_norm),
        ("sv_fro", 1.0, by_norm),
    ],
)
def test_dynamic_methods_choose_the_rank_by_singular_values(method, wanted, rank_of, large, tmp_path):
    small = tmp_path / "small.safetensors"
    words = ["--dynamic_method", method, "--dynamic_param", wanted]
    run(resize_lora, "--model", large, "--new_rank", "6", *words, "--save_to", small)
    for name in (QUERY, CONVOLUTION):
        exact = delta(large, name)
        values = np.linalg.svd(exact.flatten(1).numpy(), compute_uv=False)[:8]
        assert rank(small, name) == min(6, rank_of(values, wanted))
        assert is_optimal(delta(small, name), exact, rank(small, name))


def test_a_layer_that_changes_nothing_gets_rank_1(tmp_path):
    save_file(
        {"x.lora_down.weight": torch.ones(4, 5), "x.lora_up.weight": torch.zeros(6, 4)}, tmp_path / "a.safetensors"
    )
    words = ["--model", tmp_path / "a.safetensors", "--save_to", tmp_path / "b.safetensors"]
    run(resize_lora, *words, "--dynamic_method", "sv_fro", "--dynamic_param", "0.9")
    assert rank(tmp_path / "b.safetensors", "x") == 1 and not delta(tmp_path / "b.safetensors", "x").any()


def other_kinds(path: Path) -> Path:
    """LoKr on a convolution, OFT and DoRA on a Linear each, and a norm."""
    torch.manual_seed(0)
    weights = {
        f"{CONVOLUTION}.lokr_w1": torch.randn(4, 4),
        f"{CONVOLUTION}.lokr_w2_a": torch.randn(8, 2),
        f"{CONVOLUTION}.lokr_w2_b": torch.randn(2, 8 * 9),
        f"{CONVOLUTION}.alpha": torch.tensor(1.0),
        f"{QUERY}.oft_blocks": 0.3 * torch.randn(4, 8, 8),
        f"{TEXT}.lora_down.weight": torch.randn(2, 32),
        f"{TEXT}.lora_up.weight": torch.randn(32, 2),
        f"{TEXT}.dora_scale": torch.rand(32, 1) + 0.5,
        "lora_unet_conv_norm_out.w_norm": torch.randn(32),
        "lora_unet_down_blocks_0_resnets_0_norm1.diff": torch.randn(32),
    }
    save_file(weights, path)
    return path


@pytest.mark.parametrize("script", ["resize", "extract"])
def test_other_kinds_become_a_lora_with_the_help_of_the_model(script, tiny_file, tmp_path):
    source, target = other_kinds(tmp_path / "a.safetensors"), tmp_path / "b.safetensors"
    if script == "resize":
        words = ["--model", source, "--new_rank", 5, "--new_conv_rank", 6, "--sd_model", tiny_file]
        run(resize_lora, *words, "--save_to", target)
    else:
        words = ["--model_org", tiny_file, "--model_tuned", source, "--dim", 5, "--conv_dim", 6]
        run(extract_lora_from_models, *words, "--save_to", target)
    model = open_base_model(str(tiny_file), "--a")
    for name, wanted in ((QUERY, 5), (TEXT, 5), (CONVOLUTION, 6)):
        weight = model.read(model.find(name).weight)
        exact = open_adapter(source, "--model").layers[name].delta(weight)
        assert delta(target, name).shape == weight.shape
        assert is_optimal(delta(target, name), exact, wanted)
    for norm in ("lora_unet_conv_norm_out.w_norm", "lora_unet_down_blocks_0_resnets_0_norm1.diff"):
        assert torch.equal(load_file(target)[norm], load_file(source)[norm])


def test_without_the_model_convolutions_are_known_by_their_names(tmp_path):
    source = other_kinds(tmp_path / "a.safetensors")
    save_file({k: v for k, v in load_file(source).items() if "lokr" in k or "alpha" in k}, source)
    run(resize_lora, "--model", source, "--new_rank", 4, "--save_to", tmp_path / "b.safetensors")
    assert load_file(tmp_path / "b.safetensors")[f"{CONVOLUTION}.lora_down.weight"].shape == (4, 32, 3, 3)


def tuned(tiny_file: Path, path: Path, change_text: float = 0.0) -> Path:
    """The toy model with everything in its U-Net changed a little, and its text encoder as asked."""
    torch.manual_seed(5)
    weights = load_file(tiny_file)
    for key, value in weights.items():
        size = 0.05 if key.startswith("model.diffusion_model.") else change_text
        weights[key] = value + size * torch.randn_like(value) if value.is_floating_point() else value
    save_file(weights, path)
    return path


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_what_is_extracted_of_two_models_is_the_best_of_its_rank(kind, tmp_path):
    original = tiny.write_file(tmp_path / "model.safetensors", kind=kind)
    trained = tuned(original, tmp_path / "tuned.safetensors", 0.05)
    words = ["--model_org", original, "--model_tuned", trained, "--dim", 6, "--conv_dim", 3]
    run(extract_lora_from_models, *words, "--save_to", tmp_path / "lora.safetensors")
    before, after = open_base_model(str(original), "--a"), open_base_model(str(trained), "--b")
    layers = open_adapter(tmp_path / "lora.safetensors", "--model").layers
    assert set(layers) == {target.name for target in before.targets(conv=True)}
    for name, layer in layers.items():
        place = before.find(name).weight
        exact = after.read(after.find(name).weight) - before.read(place)
        wanted = 6 if all(side == 1 for side in place.shape[2:]) else 3
        assert layer.delta().shape == place.shape and layer.rank == min(wanted, *exact.flatten(1).shape)
        assert is_optimal(layer.delta(), exact, wanted)


def test_a_text_encoder_that_stayed_is_left_out(tiny_file, tmp_path, caplog):
    trained = tuned(tiny_file, tmp_path / "tuned.safetensors")
    words = ["--model_org", tiny_file, "--model_tuned", trained, "--dim", 2]
    run(extract_lora_from_models, *words, "--save_to", tmp_path / "lora.safetensors")
    file = open_adapter(tmp_path / "lora.safetensors", "--model")
    assert all(name.startswith("lora_unet_") for name in file.layers) and CONVOLUTION not in file.layers
    assert file.metadata["ss_network_dim"] == "2" and file.metadata["ss_base_model_version"] == "sd_v1"
    assert file.metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"


def test_factors_are_clamped_where_that_is_asked_for(tiny_file, tmp_path):
    trained = tuned(tiny_file, tmp_path / "tuned.safetensors")
    words = ["--model_org", tiny_file, "--model_tuned", trained, "--dim", 2, "--conv_dim", 2]
    run(extract_lora_from_models, *words, "--save_to", tmp_path / "a.safetensors")
    run(extract_lora_from_models, *words, "--clamp_quantile", 0.9, "--save_to", tmp_path / "b.safetensors")
    free, clamped = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    key = f"{QUERY}.lora_up.weight"
    assert clamped[key].abs().max() < free[key].abs().max()


def test_dylora_files_are_split_into_their_ranks(tmp_path):
    torch.manual_seed(0)
    down, up = torch.randn(8, 5), torch.randn(6, 8)
    weights = {"x.alpha": torch.tensor(4.0), "x.lora_down.weight": down, "x.lora_up.weight": up}
    save_file(weights, tmp_path / "dylora.safetensors", {"ss_network_dim": "8", "ss_output_name": "cat"})
    words = ["--model", tmp_path / "dylora.safetensors", "--unit", 3, "--save_to", tmp_path / "out.safetensors"]
    run(extract_lora_from_dylora, *words)
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out-0003.safetensors", "out-0006.safetensors"]
    for number in (3, 6):
        file = open_adapter(tmp_path / f"out-000{number}.safetensors", "--model")
        torch.testing.assert_close(file.layers["x"].delta(), 4.0 / number * up[:, :number] @ down[:number])
        assert file.metadata["ss_network_dim"] == str(number) and file.metadata["ss_output_name"] == "cat"


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        (resize_lora, ["--model", "{a}", "--new_rank", 0, "--save_to", "c.pt"], "--new_rank must be above 0, got 0"),
        (resize_lora, ["--model", "{a}", "--dynamic_method", "sv_fro", "--save_to", "c.pt"], "must be given together"),
        (
            resize_lora,
            ["--model", "{a}", "--dynamic_method", "sv_fro", "--dynamic_param", 2, "--save_to", "c.pt"],
            "--dynamic_param must be above 0 and at most 1 for sv_fro, got 2.0",
        ),
        (resize_lora, ["--model", "{a}", "--save_to", "c.pt"], "depends on the model's own weight: give the model"),
        (resize_lora, ["--model", "{a}", "--device", "cuda:9", "--save_to", "c.pt"], "--device cuda:9 cannot be used"),
        (
            extract_lora_from_models,
            ["--model_org", "{sd}", "--model_tuned", "{xl}", "--save_to", "c.pt"],
            "is another kind of model than .*: sdxl, sd1",
        ),
        (
            extract_lora_from_models,
            ["--model_org", "{xl}", "--model_tuned", "{a}", "--save_to", "c.pt"],
            "--model_tuned: .* was made for another model than .*: it has no lora_",
        ),
        (extract_lora_from_dylora, ["--model", "{a}", "--unit", 2, "--save_to", "c.pt"], "is no DyLoRA file"),
    ],
)
def test_mistakes_end_in_a_sentence(script, words, message, tiny_file, tiny_sdxl_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"a": other_kinds(tmp_path / "a.safetensors"), "sd": tiny_file, "xl": tiny_sdxl_file}
    with pytest.raises(UserError, match=message):
        run(script, *(str(word).format(**names) for word in words))
    assert not list(tmp_path.glob("c*"))


def test_network_args_of_an_extracted_lora_make_its_convolutions_again(tiny_file, tmp_path):
    trained = tuned(tiny_file, tmp_path / "tuned.safetensors")
    words = ["--model_org", tiny_file, "--model_tuned", trained, "--dim", 2, "--conv_dim", 3, "--no_metadata"]
    run(extract_lora_from_models, *words, "--save_to", tmp_path / "a.safetensors")
    metadata = open_adapter(tmp_path / "a.safetensors", "--model").metadata
    assert json.loads(metadata["ss_network_args"]) == {"conv_dim": "3", "conv_alpha": "3.0"}
    assert not any(name.startswith("modelspec.") for name in metadata)
