"""What the files of flags are: networks of every base model are known by their names and shapes, in either format."""

from pathlib import Path

import pytest
import torch

from library.errors import UserError
from library.families import detect
from library.families.detect import CheckpointInfo
from library.given_files import base_kinds, check_network
from library.network_files import write_weights
from networks.lora_arguments import check_ranks

SD1 = CheckpointInfo(Path("base.safetensors"), "sd1", is_folder=False)


@pytest.mark.parametrize(
    ("name", "width", "kinds"),
    [
        ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k", 768, ("sd1",)),
        ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k", 1024, ("sd2",)),
        ("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k", 2048, ("sdxl",)),
        ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_k", 768, ()),
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_k", 64, ("sdxl",)),
        ("lora_te1_text_model_encoder_layers_0_self_attn_q_proj", 768, ("sdxl",)),
        ("lora_te_text_model_encoder_layers_0_self_attn_q_proj", 1024, ("sd2",)),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", 5, ("sd1", "sd2")),
        ("lora_unet_double_blocks_0_img_attn_qkv", 3072, ("flux",)),
    ],
)
def test_the_base_model_of_a_network_is_known_by_names_and_widths(name, width, kinds):
    assert base_kinds({f"{name}.alpha": (), f"{name}.lora_down.weight": (4, width)}) == kinds
    assert set(kinds) <= detect.KINDS.keys()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_an_embedding_or_a_network_of_another_base_is_refused_in_either_format(suffix, tmp_path):
    path = tmp_path / f"网络{suffix}"
    write_weights(path, {"emb_params": torch.zeros(2, 768)}, None, None)
    with pytest.raises(UserError, match=f"--base_weights: .*网络{suffix} is a textual-inversion embedding"):
        check_network(str(path), "--base_weights", SD1, is_ours=True)
    write_weights(path, {"lora_te2_text_projection.lora_down.weight": torch.zeros(4, 64)}, None, None)
    with pytest.raises(UserError, match="is a network for a Stable Diffusion XL base model, but base.safetensors is"):
        check_network(str(path), "--base_weights", SD1, is_ours=True)


def test_names_that_are_not_known_are_refused_only_for_networks_of_this_project(tmp_path):
    path = tmp_path / "a.safetensors"
    write_weights(path, {"something.else": torch.zeros(2)}, None, None)
    assert check_network(str(path), "--network_weights", SD1, is_ours=False) == {"something.else": (2,)}
    with pytest.raises(UserError, match="whose weights have names that no"):
        check_network(str(path), "--network_weights", SD1, is_ours=True)


def test_layers_with_full_weights_are_a_network_too(tmp_path):
    path = tmp_path / "a.safetensors"
    write_weights(path, {"lora_unet_conv_in.diff": torch.zeros(2)}, None, None)
    assert check_network(str(path), "--network_weights", SD1, is_ours=True)


def test_ranks_are_compared_where_the_file_and_the_flags_tell_one():
    weights = {"a.lora_down.weight": (8, 3), "b.lora_down.weight": (2, 3, 3, 3), "c.lora_down.weight": (8, 3, 1, 1)}
    check_ranks(weights, "net.safetensors", 8, {"conv_dim": "2"})
    check_ranks(weights, "net.safetensors", 4, {"block_dims": ",".join(["8"] * 25)})
    check_ranks(dict.fromkeys(weights), "net.ckpt", 4, {})
    with pytest.raises(UserError, match="has rank 8, but --network_dim is 4 where it is not given; give .*dim 8 or"):
        check_ranks(weights, "net.safetensors", None, {})
    with pytest.raises(
        UserError, match="ranks from 2 to 8, but --network_dim is 4; give block_dims or --dim_from_weights"
    ):
        check_ranks(weights | {"d.lora_down.weight": (2, 3)}, "net.safetensors", 4, {})


@pytest.mark.parametrize("flag", ["--network_weights", "--base_weights"])
def test_what_is_not_there_or_no_network_is_said_without_torch(flag, tmp_path):
    with pytest.raises(UserError, match=rf"{flag}: there is no file .*none\.safetensors"):
        check_network(str(tmp_path / "none.safetensors"), flag, None, True)
    (tmp_path / "notes.txt").write_text("not a network", encoding="utf-8")
    with pytest.raises(UserError, match=rf"{flag}: .*notes\.txt is no network file"):
        check_network(str(tmp_path / "notes.txt"), flag, None, True)
