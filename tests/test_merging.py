"""Merging: weights and outputs are those of the model with the adapter applied, in memory for one tensor at a time."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.adapters.base_model import open_base_model
from library.adapters.block_weights import block_of, read_block_weights
from library.adapters.file import open_adapter
from library.errors import UserError
from library.families.base import ModelFamily
from library.network_files import content_hashes
from library.options.groups import TrainNetworkOptions
from networks import lora, merge_lora, sdxl_merge_lora, svd_merge_lora
from tests import tiny

SCRIPTS = {"sd1": merge_lora, "sd2": merge_lora, "sdxl": sdxl_merge_lora}
ROOT = Path(__file__).parents[1]


@pytest.fixture(params=SCRIPTS)
def model(request, tiny_file, tiny_sd2_file, tiny_sdxl_file) -> tuple[str, Path]:
    """A toy model's kind and file."""
    return request.param, {"sd1": tiny_file, "sd2": tiny_sd2_file, "sdxl": tiny_sdxl_file}[request.param]


def family_of(path: Path) -> ModelFamily:
    return tiny.load_family(TrainNetworkOptions(pretrained_model_name_or_path=str(path)))


def write_network(family: ModelFamily, path: Path, seed: int = 0, **metadata: str) -> Path:
    """A LoRA on all layers and convolutions that changes outputs visibly."""
    torch.manual_seed(seed)
    network = lora.create_network(list(family.adapter_targets(conv=True)), 4, 2, conv_dim="2", conv_alpha="1")
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    network.save_weights(path, None, metadata)
    return path


def outputs(family: ModelFamily) -> Tensor:
    """What U-Net and text encoders make of a prompt and noise."""
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return family.predict(noise, torch.tensor([200, 700]), family.prompt_conds("a cat", "dog"))


def run(script, *words: object) -> None:
    script.main([str(word) for word in words])


def test_a_merged_model_draws_what_the_adapter_draws(model, tmp_path):
    kind, path = model
    family = family_of(path)
    plain = outputs(family)
    file = write_network(family, tmp_path / "lora 网络.safetensors")
    merged = tmp_path / "merged 模型.safetensors"
    run(SCRIPTS[kind], "--sd_model", path, "--models", file, "--ratios", "0.7", "--save_to", merged)
    network = lora.create_network_from_weights(list(family.adapter_targets(conv=True)), file)
    network.apply_to()
    network.set_multiplier(0.7)
    expected = outputs(family)
    assert (expected - plain).abs().max() > 0.01
    torch.testing.assert_close(outputs(family_of(merged)), expected, rtol=1e-3, atol=2e-4)


def test_every_changed_weight_is_the_old_one_and_the_ratio_times_the_change(model, tmp_path):
    kind, path = model
    files = [write_network(family_of(path), tmp_path / f"{seed}.safetensors", seed) for seed in (1, 2)]
    merged = tmp_path / "merged.safetensors"
    run(SCRIPTS[kind], "--sd_model", path, "--models", *files, "--ratios", "0.7", "-0.4", "--save_to", merged)
    before, after = open_base_model(str(path), "--a"), open_base_model(str(merged), "--b")
    adapters = [open_adapter(file, "--model") for file in files]
    for name in adapters[0].layers:
        places = before.find(name)
        change = sum(r * a.layers[name].delta() for r, a in zip((0.7, -0.4), adapters, strict=True))
        expected = before.read(places.weight) + change.reshape(places.weight.shape)
        torch.testing.assert_close(after.read(after.find(name).weight), expected, rtol=1e-5, atol=1e-6)
    changed = {before.find(name).weight.key for name in adapters[0].layers}
    old, new = load_file(path), load_file(merged)
    assert old.keys() == new.keys()
    assert all(torch.equal(old[key], new[key]) == (key not in changed) for key in old)


def test_a_diffusers_folder_stays_one(tiny_folder, tiny_file, tmp_path):
    file = write_network(family_of(tiny_file), tmp_path / "lora.safetensors")
    run(merge_lora, "--sd_model", tiny_folder, "--models", file, "--save_to", tmp_path / "folder")
    run(merge_lora, "--sd_model", tiny_file, "--models", file, "--save_to", tmp_path / "file.safetensors")
    expected = outputs(family_of(tmp_path / "file.safetensors"))
    torch.testing.assert_close(outputs(family_of(tmp_path / "folder")), expected)
    names = {path.relative_to(tiny_folder) for path in tiny_folder.rglob("*")}
    assert {path.relative_to(tmp_path / "folder") for path in (tmp_path / "folder").rglob("*")} == names


def test_other_kinds_of_adapters_change_thirds_norms_and_biases(tiny_sd2_file, tmp_path):
    """OpenCLIP holds queries, keys and values as one weight, and norms are in no LoRA."""
    torch.manual_seed(0)
    model = open_base_model(str(tiny_sd2_file), "--a")
    key = "lora_te_text_model_encoder_layers_1_self_attn_k_proj"
    norm = "lora_unet_down_blocks_0_resnets_0_norm1"
    weights = {
        f"{key}.oft_blocks": 0.2 * torch.randn(4, 16, 16),
        f"{key}.diff_b": torch.randn(64),
        f"{norm}.w_norm": torch.randn(64),
        f"{norm}.b_norm": torch.randn(64),
    }
    save_file(weights, tmp_path / "a.safetensors")
    merged = tmp_path / "merged.safetensors"
    run(merge_lora, "--sd_model", tiny_sd2_file, "--models", tmp_path / "a.safetensors", "--save_to", merged)
    after = open_base_model(str(merged), "--b")
    layer = open_adapter(tmp_path / "a.safetensors", "--a").layers[key]
    for name, change in ((key, layer.delta(model.read(model.find(key).weight))), (norm, weights[f"{norm}.w_norm"])):
        torch.testing.assert_close(
            after.read(after.find(name).weight), model.read(model.find(name).weight) + change, rtol=1e-5, atol=1e-6
        )
        assert not torch.equal(after.read(after.find(name).bias), model.read(model.find(name).bias))
    other = key.replace("k_proj", "q_proj")
    assert torch.equal(after.read(after.find(other).weight), model.read(model.find(other).weight))


def test_precision_and_metadata_of_a_merged_model(tiny_file, tmp_path):
    file = write_network(family_of(tiny_file), tmp_path / "my lora.safetensors")
    merged = tmp_path / "merged.safetensors"
    words = ["--sd_model", tiny_file, "--models", file, "--save_to", merged, "--save_precision", "fp16"]
    run(merge_lora, *words)
    with safe_open(merged, "pt") as opened:
        assert {opened.get_tensor(key).dtype for key in opened.keys()} == {torch.float16}  # noqa: SIM118
        metadata = opened.metadata()
    assert metadata["modelspec.merged_from"] == "tiny 模型, my lora"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1"
    assert metadata["modelspec.title"] == "merged"


def test_what_the_model_says_of_itself_stays_and_flags_without_effect_are_named(tiny_sd2_file, tmp_path, capsys):
    file = write_network(family_of(tiny_sd2_file), tmp_path / "lora.safetensors")
    own = {"modelspec.architecture": "stable-diffusion-v2-768-v", "modelspec.title": "Mine", "format": "pt"}
    save_file(load_file(tiny_sd2_file), tmp_path / "mine.safetensors", own)
    words = ["--sd_model", tmp_path / "mine.safetensors", "--models", file, "--v2", "--concat"]
    run(merge_lora, *words, "--precision", "bf16", "--save_to", tmp_path / "merged.safetensors")
    with safe_open(tmp_path / "merged.safetensors", "pt") as opened:
        assert opened.metadata()["modelspec.architecture"] == "stable-diffusion-v2-768-v"
        assert opened.metadata()["modelspec.merged_from"] == "Mine, lora"
        assert {opened.get_tensor(key).dtype for key in opened.keys()} == {torch.bfloat16}  # noqa: SIM118
    told = capsys.readouterr().err
    assert "--v2 has no effect: the files tell" in told and "--concat has no effect with --sd_model" in told


def test_memory_holds_one_tensor_and_not_the_model(tiny_file, tmp_path):
    """The file is made larger by 192 MB of tensors that a merge copies."""
    weights = load_file(tiny_file) | {f"other.{number}": torch.zeros(4_000_000) for number in range(12)}
    save_file(weights, tmp_path / "large.safetensors")
    file = write_network(family_of(tiny_file), tmp_path / "lora.safetensors")
    code = (
        "import resource, sys; sys.path.insert(0, '.'); from networks import merge_lora; "
        "import library.adapters.merge_jobs; peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; "
        "before = peak(); merge_lora.main(sys.argv[1:]); print((peak() - before) // 1024)"
    )
    words = ["--sd_model", tmp_path / "large.safetensors", "--models", file, "--save_to", tmp_path / "m.safetensors"]
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "m.safetensors").stat().st_size > 192_000_000
    assert int(done.stdout) < 80  # MB


def small_lora(path: Path, rank: int, seed: int, alpha: float = 1.0) -> Path:
    """Two layers of the toy model's U-Net, one of them a convolution."""
    torch.manual_seed(seed)
    weights = {}
    for name, out, inside in (
        ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q", 32, (24,)),
        ("lora_unet_down_blocks_0_resnets_0_conv1", 32, (16, 3, 3)),
    ):
        weights[f"{name}.alpha"] = torch.tensor(alpha)
        weights[f"{name}.lora_down.weight"] = torch.randn(rank, *inside)
        weights[f"{name}.lora_up.weight"] = torch.randn(out, rank, *[1] * (len(inside) - 1))
    save_file(weights, path, {"ss_base_model_version": "sd_v1", "ss_network_dim": str(rank)})
    return path


def changes(path: Path) -> dict[str, Tensor]:
    return {name: layer.delta() for name, layer in open_adapter(path, "--model").layers.items()}


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return small_lora(tmp_path / "a.safetensors", 4, 1, 2.0), small_lora(tmp_path / "b.safetensors", 3, 2, 5.0)


def test_concat_adds_the_changes_exactly(pair, tmp_path):
    merged = tmp_path / "c.safetensors"
    run(merge_lora, "--models", *pair, "--ratios", "0.8", "-0.5", "--save_to", merged, "--concat", "--shuffle")
    one, other, sums = changes(pair[0]), changes(pair[1]), changes(merged)
    for name in one:
        torch.testing.assert_close(sums[name], 0.8 * one[name] - 0.5 * other[name])
    assert {layer.rank for layer in open_adapter(merged, "--model").layers.values()} == {7}


def test_without_concat_the_largest_rank_is_used_as_well_as_can_be(pair, tmp_path):
    merged = tmp_path / "c.safetensors"
    run(merge_lora, "--models", *pair, "--save_to", merged)
    one, other, sums = changes(pair[0]), changes(pair[1]), changes(merged)
    for name in one:
        exact = (one[name] + other[name]).flatten(1)
        least = torch.linalg.svdvals(exact)[4:].norm()
        torch.testing.assert_close((sums[name].flatten(1) - exact).norm(), least, rtol=1e-4, atol=1e-4)


def test_what_merged_files_say_of_themselves(pair, tmp_path):
    merged = tmp_path / "c.safetensors"
    run(merge_lora, "--models", *pair, "--save_to", merged, "--save_precision", "fp16")
    metadata = open_adapter(merged, "--model").metadata
    assert metadata["ss_network_module"] == "networks.lora"
    assert metadata["ss_base_model_version"] == "sd_v1"
    assert metadata["ss_network_dim"] == "4"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
    weights = load_file(merged)
    assert {value.dtype for value in weights.values()} == {torch.float16}
    assert content_hashes(weights, metadata).items() <= metadata.items()


def test_svd_merge_takes_all_kinds_and_weighs_blocks(pair, tmp_path):
    name = "lora_unet_down_blocks_0_resnets_0_conv1"
    torch.manual_seed(3)
    parts = {"hada_w1_a": (32, 2), "hada_w1_b": (2, 144), "hada_w2_a": (32, 2), "hada_w2_b": (2, 144)}
    weights = {f"{name}.{part}": torch.randn(size) for part, size in parts.items()} | {f"{name}.alpha": torch.ones(())}
    save_file(weights, tmp_path / "loha.safetensors")
    merged, half = tmp_path / "c.safetensors", json.dumps([1.0, 0.0, 0.5, *[1.0] * 23])
    ones = json.dumps([1] * 26)
    words = ["--models", pair[0], tmp_path / "loha.safetensors", "--ratios", "0.8", "2", "--lbws", half, ones]
    run(svd_merge_lora, *words, "--new_rank", "5", "--new_conv_rank", "3", "--save_to", merged)
    first, loha, found = changes(pair[0]), changes(tmp_path / "loha.safetensors")[name], changes(merged)
    exact = (0.8 * 0.5 * first[name] + 2 * loha.reshape(first[name].shape)).flatten(1)
    assert found[name].shape == (32, 16, 3, 3)
    least = torch.linalg.svdvals(exact)[3:].norm()
    torch.testing.assert_close((found[name].flatten(1) - exact).norm(), least, rtol=1e-3, atol=1e-3)
    query = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    torch.testing.assert_close(found[query], 0.4 * first[query], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", "BASE"),
        ("lora_unet_time_embedding_linear_1", "BASE"),
        ("lora_unet_down_blocks_0_attentions_0_proj_in", "IN01"),
        ("lora_unet_down_blocks_1_downsamplers_0_conv", "IN06"),
        ("lora_unet_mid_block_resnets_0_conv1", "MID"),
        ("lora_unet_up_blocks_1_attentions_2_proj_out", "OUT05"),
        ("lora_unet_input_blocks_4_1_proj_in", "IN04"),
        ("lora_unet_middle_block_1_proj_in", "MID"),
        ("lora_unet_output_blocks_8_0_in_layers_2", "OUT08"),
        ("unet.down_blocks.1.attentions.0.proj_in", "IN04"),
    ],
)
def test_blocks_are_those_of_the_lists(name, block):
    assert block_of(name) == block


def test_short_lists_name_the_blocks_that_attend():
    twelve = read_block_weights(str(list(range(12))))
    assert twelve.of("lora_unet_input_blocks_7_1_proj_in") == 3
    assert twelve.of("lora_unet_output_blocks_5_1_proj_in") == 11
    assert twelve.of("lora_unet_input_blocks_1_0_in_layers_2") == 1.0
    assert read_block_weights(str(list(range(17)))).of("lora_unet_up_blocks_3_attentions_2_proj_in") == 16


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--models", "no.safetensors", "--save_to", "c.safetensors"], "--models: there is no file no.safetensors"),
        (
            ["--models", "{a}", "--ratios", "1", "2", "--save_to", "c.safetensors"],
            "--ratios must be as many as --models",
        ),
        (["--models", "{a}", "--lbws", "[1,2]", "--save_to", "c.safetensors"], "--lbws must be a list of 12, 17, 20"),
        (["--models", "{a}", "--save_to", "{a}"], "--save_to must be another file than those that are read"),
        (
            ["--models", "{a}", "--save_to", "c.zip"],
            "--save_to must end in .safetensors or .pt or .pth or .ckpt, got c.zip",
        ),
        (["--models", "{a}", "--sd_model", "{sd}", "--save_to", "c.ckpt"], "--save_to must end in .safetensors, got"),
        (
            ["--models", "{xl}", "--sd_model", "{sd}", "--save_to", "c.safetensors"],
            "was made for another kind of model",
        ),
        (["--models", "{a}", "{other}", "--save_to", "c.safetensors"], r"has sizes \(32, 24\) and \(32, 25\)"),
        (["--models", "{loha}", "--save_to", "c.safetensors"], "x is LoHa, .* use svd_merge_lora.py"),
        (["--models", "{sd}", "--save_to", "c.safetensors"], "has no layer of a LoRA or another adapter"),
    ],
)
def test_mistakes_end_in_a_sentence(words, message, pair, tiny_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_file({"lora_unet_input_blocks_4_1_proj_in.lora_up.weight": torch.ones(2, 2)} | {
        "lora_unet_input_blocks_4_1_proj_in.lora_down.weight": torch.ones(2, 2)}, "xl.safetensors")  # fmt: skip
    save_file({f"x.hada_w{n}": torch.ones(2, 2) for n in ("1_a", "1_b", "2_a", "2_b")}, "loha.safetensors")
    query = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    wide = {f"{query}.lora_up.weight": torch.ones(32, 2), f"{query}.lora_down.weight": torch.ones(2, 25)}
    save_file(wide, "other.safetensors")
    names = {
        "a": pair[0],
        "other": "other.safetensors",
        "sd": tiny_file,
        "xl": "xl.safetensors",
        "loha": "loha.safetensors",
    }
    with pytest.raises(UserError, match=message):
        run(merge_lora, *(word.format(**names) for word in words))
    assert not (tmp_path / "c.safetensors").exists()
