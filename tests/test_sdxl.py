"""Stable Diffusion XL: two text encoders, sizes as conditioning, names of LDM's layout. Whole runs at toy size."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from library.dataset.dataset import TrainingDataset, collate
from library.dataset.scan import scan_dataset
from library.errors import UserError
from library.families.base import AdapterTarget, Batch
from library.families.sdxl import Sdxl, sdxl_adapter_targets, size_conditions, whole_pictures
from library.options.groups import TrainNetworkOptions
from networks import lora
from tests import tiny
from tests.test_network_names import full_size_sdxl
from train_network import train

CPU = torch.device("cpu")
LONG = "a cat " + " ".join(["mouse"] * 90)


@pytest.fixture
def build(tiny_sdxl_file):
    def make(**changes: object) -> Sdxl:
        given = TrainNetworkOptions(pretrained_model_name_or_path=str(tiny_sdxl_file), **changes)
        return Sdxl(given, CPU, torch.float32)

    return make


def batch(captions: list[str]) -> Batch:
    sizes = torch.full((len(captions), 2), 64)
    return Batch(captions, torch.ones(len(captions)), None, None, None, None, sizes, sizes, sizes)


def run(model: Path, pictures: Path, output: Path, **changes: object) -> Path:
    """Two epochs; the file that was written."""
    settings = dict(max_train_epochs=2, bucket_reso_steps=32, resolution="64,64", learning_rate=1e-2)
    train(tiny.arguments(model, pictures, output, **settings | changes))
    return output / "lora.safetensors"


def targets() -> list[AdapterTarget]:
    models = tiny.models("sdxl")
    return list(sdxl_adapter_targets(models.text_encoders, models.unet, conv=True))


def equal(first: Path, second: Path) -> bool:
    a, b = load_file(first), load_file(second)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@torch.no_grad()
def test_conditioning_is_the_layer_before_the_last_of_both_encoders_and_the_second_ones_projection(build):
    family = build()
    found = family.conds(batch(["a cat", ""]))
    states = []
    for tokenizer, encoder in zip(family.tokenizers, family.text_encoders, strict=True):
        ids = tokenizer(["a cat", ""], padding="max_length", max_length=77, return_tensors="pt").input_ids
        states.append(encoder(ids, output_hidden_states=True))
    assert [tokenizer.pad_token_id for tokenizer in family.tokenizers] == [49407, 0]
    hidden = torch.cat([state.hidden_states[-2] for state in states], dim=-1)
    torch.testing.assert_close(found["hidden"], hidden)
    torch.testing.assert_close(found["pooled"], states[1].text_embeds)


@torch.no_grad()
def test_long_captions_have_more_hidden_states_and_the_first_chunks_pooled_text(build):
    short, long = build().conds(batch([LONG])), build(max_token_length=225).conds(batch([LONG]))
    assert short["hidden"].shape == (1, 77, 96) and long["hidden"].shape == (1, 227, 96)
    torch.testing.assert_close(long["hidden"][:, :76], short["hidden"][:, :76])
    torch.testing.assert_close(long["pooled"], short["pooled"])


@torch.no_grad()
def test_weighted_captions_weigh_both_encoders_and_not_the_pooled_text(build):
    plain = build().conds(batch(["a cat"]))
    weighted = build(weighted_captions=True).conds(batch(["a (cat:1.5)"]))
    ratio = weighted["hidden"] / plain["hidden"]
    torch.testing.assert_close(ratio[0, 2], torch.full((96,), 1.5))
    torch.testing.assert_close(weighted["pooled"], plain["pooled"])


def test_sizes_are_those_of_kohyas_batches(tmp_path):
    (tmp_path / "1_cat").mkdir()
    Image.new("RGB", (640, 480)).save(tmp_path / "1_cat" / "a.png")
    options = TrainNetworkOptions(
        train_data_dir=str(tmp_path), resolution="512,512", enable_bucket=True, flip_aug=True, cache_latents=True
    )
    dataset = TrainingDataset(scan_dataset(options), options, seed=0, max_train_steps=8)
    sampler, found = dataset.sampler(), set()
    for epoch in range(1, 9):
        sampler.set_epoch(epoch)
        examples = [dataset[draw] for draws in sampler for draw in draws]
        found |= {tuple(row) for row in size_conditions(collate(examples)).tolist()}
    # 640x480 goes into 576x448; the fitted picture begins 8 pixels from the top, mirrored or not
    assert found == {(480, 640, 8, 0, 448, 576)}
    whole = whole_pictures(torch.zeros(2, 4, 16, 8))
    assert whole.tolist() == [[128, 64, 0, 0, 128, 64]] * 2


def test_a_run_writes_ldm_names_and_what_programs_look_for(tiny_sdxl_file, pictures, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a (cat:1.2) --n dog --w 64 --h 64 --s 2 --d 7\n", encoding="utf-8")
    path = run(
        tiny_sdxl_file, pictures, tmp_path / "out", cache_latents_to_disk=True, sample_prompts=prompts,
        sample_every_n_epochs=1, gradient_checkpointing=True, network_args=["conv_dim=4"], before_after=True,
    )  # fmt: skip
    names = {name.partition(".")[0] for name in load_file(path)}
    assert names == {target.name for target in targets()}
    assert "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k" in names
    assert {name.split("_")[1] for name in names} == {"te1", "te2", "unet"}
    with safe_open(str(path), "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_base_model_version"] == "sdxl_base_v1-0" and metadata["ss_v2"] == "False"
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert metadata["modelspec.implementation"] == "https://github.com/Stability-AI/generative-models"
    assert sorted(p.name for p in (pictures / "2_cat").glob("*.npz"))[0] == "picture 0_0128x0064_sdxl.npz"
    assert len(list((tmp_path / "out" / "sample").glob("*.png"))) == 2


@pytest.mark.parametrize("frozen", [True, False])
def test_a_resumed_run_gives_the_same_bits(tiny_sdxl_file, pictures, tmp_path, frozen):
    settings = dict(network_train_unet_only=frozen, save_state=True, save_every_n_epochs=1, train_batch_size=2)
    whole = run(tiny_sdxl_file, pictures, tmp_path / "whole", **settings)
    state = tmp_path / "whole" / "lora-000001-state"
    assert equal(run(tiny_sdxl_file, pictures, tmp_path / "rest", resume=state, **settings), whole)


@pytest.mark.parametrize(
    ("rates", "trained"),
    [([0.0, 1e-2], {"te2", "unet"}), ([1e-2, 0.0], {"te1", "unet"}), ([1e-3, 1e-2], {"te1", "te2", "unet"})],
)
def test_text_encoders_may_have_a_rate_each(tiny_sdxl_file, pictures, tmp_path, rates, trained, capsys):
    path = run(tiny_sdxl_file, pictures, tmp_path / "out", text_encoder_lr=rates)
    ups = {name: value for name, value in load_file(path).items() if name.endswith("lora_up.weight")}
    assert {name.split("_")[1] for name, value in ups.items() if value.abs().sum() > 0} == trained
    with safe_open(str(path), "pt") as file:
        assert file.metadata()["ss_text_encoder_lr"] == str(rates)
    assert "text encoder 2" in capsys.readouterr().out


def test_ranks_by_block_follow_kohyas_numbers():
    ranks = [0, *range(2, 24)]  # block n has rank n + 1; the first has no layers
    with torch.device("meta"):
        targets = list(sdxl_adapter_targets(*full_size_sdxl(), conv=False))
        network = lora.create_network(targets, 4, 1, block_dims=",".join(map(str, ranks)))
    found = {name: len(value) for name, value in network.state_dict().items() if name.endswith("lora_down.weight")}
    for part, first in {"input_blocks_4_1": 5, "middle_block_1": 11, "output_blocks_0_1": 13}.items():
        inside = {rank for name, rank in found.items() if name.startswith(f"lora_unet_{part}_")}
        assert inside == {first + 1}, part


def test_a_file_with_diffusers_names_is_read_as_well(tiny_sdxl_file, pictures, tmp_path):
    path = run(tiny_sdxl_file, pictures, tmp_path / "a")
    other = {target.name: target.other_name for target in targets() if target.other_name}
    renamed = {}
    for name, value in load_file(path).items():
        layer, _, rest = name.partition(".")
        renamed[f"{other.get(layer, layer)}.{rest}"] = value
    assert "lora_unet_mid_block_attentions_0_proj_in.alpha" in renamed
    save_file(renamed, tmp_path / "diffusers.safetensors")
    files = [
        run(tiny_sdxl_file, pictures, tmp_path / name, network_weights=weights, dim_from_weights=from_file)
        for name, weights, from_file in [
            ("b", path, False),
            ("c", tmp_path / "diffusers.safetensors", False),
            ("d", tmp_path / "diffusers.safetensors", True),
        ]
    ]
    assert equal(files[0], files[1]) and equal(files[0], files[2]) and not equal(files[0], path)


def test_lycoris_gives_ldm_names_too(tiny_sdxl_file, pictures, tmp_path):
    pytest.importorskip("lycoris", reason="LyCORIS is an optional package")
    path = run(
        tiny_sdxl_file, pictures, tmp_path / "out", network_module="lycoris.kohya", network_args=["algo=loha"],
        max_train_epochs=1,
    )  # fmt: skip
    names = {name.partition(".")[0] for name in load_file(path)}
    assert names == {target.name for target in targets()}


def test_the_script_for_sdxl_refuses_other_models_and_says_what_trains_them(tiny_file, pictures, tmp_path):
    with pytest.raises(UserError, match=r"1\.x model; this script trains .* XL .*use train_network\.py"):
        train(tiny.arguments(tiny_file, pictures, tmp_path / "out"), family="sdxl")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({}, "--cache_text_encoder_outputs is for text encoders that are not trained"),
        ({"network_train_unet_only": True, "shuffle_caption": True}, "does not go with captions that change .*2_cat"),
        ({"bucket_reso_steps": 40}, "--bucket_reso_steps must be a multiple of 32 for this model, got 40"),
    ],
)
def test_what_cannot_be_is_told_before_training(tiny_sdxl_file, pictures, tmp_path, changes, sentence):
    caches = {"cache_text_encoder_outputs": "bucket_reso_steps" not in changes}
    with pytest.raises(UserError, match=sentence):
        run(tiny_sdxl_file, pictures, tmp_path / "out", **caches, **changes)
