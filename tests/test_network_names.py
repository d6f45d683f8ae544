"""The names and shapes in files are a contract: they equal those that kohya's scripts write, in the same order."""

import gzip
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from library.families.sd import sd_adapter_targets
from library.families.sdxl import sdxl_adapter_targets
from networks import dylora, lora, lora_fa, oft
from tools.make_random_checkpoint import random_models

KEYS = Path(__file__).parent / "data" / "keys"


def golden(name: str) -> dict[str, list[int]]:
    return json.loads(gzip.decompress((KEYS / f"{name}.json.gz").read_bytes()))


# U-Net and text encoder as they differ between models
SD1 = (
    dict(cross_attention_dim=768, attention_head_dim=8),
    dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12),
)
SD2 = (
    dict(cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20)),
    dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16, hidden_act="gelu"),
)
GOLDEN = {
    "sd15_default": (SD1, {}),
    "sd15_conv": (SD1, {"conv_dim": "4"}),
    "sd21_default": (SD2, {}),
    "sd21_linear_projection_default": ((SD2[0] | {"use_linear_projection": True}, SD2[1]), {}),
}


def full_size(unet: dict, text_encoder: dict) -> tuple[CLIPTextModel, UNet2DConditionModel]:
    """A model as it is, without memory for its weights."""
    with torch.device("meta"):
        return CLIPTextModel(CLIPTextConfig(**text_encoder)), UNet2DConditionModel(**unet)


@pytest.mark.parametrize("name", GOLDEN)
def test_lora_keys_equal_kohyas_in_order(name):
    model, arguments = GOLDEN[name]
    targets = list(sd_adapter_targets(*full_size(*model), conv=lora.wants_convolutions(arguments)))
    with torch.device("meta"):
        network = lora.create_network(targets, 4, 1, **arguments)
    written = [(key, list(value.shape)) for key, value in network.state_dict().items()]
    assert written == list(golden(name).items())


OTHERS = {
    "lora_fa_sd15": (lora_fa, {}),
    "lora_fa_sd15_conv": (lora_fa, {"conv_dim": "4"}),
    "lora_fa_sdxl": (lora_fa, {}),
    "dylora_sd15": (dylora, {}),
    "oft_sd15": (oft, {}),
    "oft_sd15_all_linear": (oft, {"enable_all_linear": "True"}),
    "oft_sd15_conv": (oft, {"enable_conv": "True"}),
    "oft_sdxl": (oft, {}),
}


def written_keys(algorithm: ModuleType, arguments: dict[str, str], is_sdxl: bool) -> list[tuple[str, list[int]]]:
    """Names and shapes of the file of a network on a model of full size."""
    conv = algorithm.wants_convolutions(arguments)
    if is_sdxl:
        targets = list(sdxl_adapter_targets(*full_size_sdxl(), conv))
    else:
        targets = list(sd_adapter_targets(*full_size(*SD1), conv))
    with torch.device("meta"):
        network = algorithm.create_network(targets, 4, 1, **arguments)
    return [(key, list(value.shape)) for key, value in network.state_dict().items()]


@pytest.mark.parametrize("name", OTHERS)
def test_keys_of_other_networks_equal_kohyas_in_order(name):
    assert written_keys(*OTHERS[name], name.endswith("sdxl")) == list(golden(name).items())


def test_dylora_of_sdxl_has_the_names_of_both_text_encoders_which_kohyas_gives_one_name():
    written, theirs = written_keys(dylora, {}, True), golden("dylora_sdxl")
    assert written == list(golden("sdxl_default").items())
    assert [pair for pair in written if "_unet_" in pair[0]] == [p for p in theirs.items() if "_unet_" in p[0]]


def full_size_sdxl() -> tuple[tuple[torch.nn.Module, ...], UNet2DConditionModel]:
    with torch.device("meta"):
        models = random_models("sdxl")
    return models.text_encoders, models.unet


@pytest.mark.parametrize(("name", "arguments"), [("sdxl_default", {}), ("sdxl_conv", {"conv_dim": "4"})])
def test_sdxl_lora_keys_equal_kohyas_in_order(name, arguments):
    targets = list(sdxl_adapter_targets(*full_size_sdxl(), conv=lora.wants_convolutions(arguments)))
    with torch.device("meta"):
        network = lora.create_network(targets, 4, 1, **arguments)
    written = [(key, list(value.shape)) for key, value in network.state_dict().items()]
    assert written == list(golden(name).items())


BLOCKS_BY_LDM_NAME = {  # as in merge-block-weight tools: IN01 is 1, M00 is 12, OUT03 is 16
    1: "down_blocks_0_attentions_0", 2: "down_blocks_0_attentions_1", 3: "down_blocks_0_downsamplers_0",
    4: "down_blocks_1_attentions_0", 5: "down_blocks_1_attentions_1", 6: "down_blocks_1_downsamplers_0",
    7: "down_blocks_2_attentions_0", 8: "down_blocks_2_attentions_1", 9: "down_blocks_2_downsamplers_0",
    10: "down_blocks_3_resnets_0", 11: "down_blocks_3_resnets_1", 12: "mid_block",
    13: "up_blocks_0_resnets_0", 14: "up_blocks_0_resnets_1", 15: "up_blocks_0_resnets_2",
    16: "up_blocks_1_attentions_0", 17: "up_blocks_1_attentions_1", 18: "up_blocks_1_attentions_2",
    19: "up_blocks_2_attentions_0", 20: "up_blocks_2_attentions_1", 21: "up_blocks_2_attentions_2",
    22: "up_blocks_3_attentions_0", 23: "up_blocks_3_attentions_1", 24: "up_blocks_3_attentions_2",
}  # fmt: skip
SAMPLERS_UP = {15: "up_blocks_0_upsamplers_0", 18: "up_blocks_1_upsamplers_0", 21: "up_blocks_2_upsamplers_0"}


def test_every_layer_of_the_unet_is_in_kohyas_block_and_none_of_the_text_encoder_is_in_one():
    targets = list(sd_adapter_targets(*full_size(*SD1), conv=True))
    for target in targets:
        if target.part == "te":
            assert target.block is None and target.layout is None
            continue
        attention = BLOCKS_BY_LDM_NAME[target.block]
        allowed = (attention, attention.replace("attentions", "resnets"), SAMPLERS_UP.get(target.block, attention))
        assert target.name.startswith(tuple(f"lora_unet_{name}_" for name in allowed)), (target.name, target.block)
    assert {target.block for target in targets if target.part == "unet"} == set(range(1, 25))
    assert targets[-1].layout.num_blocks == 25


def test_a_rank_for_every_block_is_found_in_the_file():
    ranks = [*range(1, 13), 0, *range(14, 26)]  # block n has rank n + 1, and the middle none
    arguments = {"block_dims": ",".join(map(str, ranks)), "conv_block_dims": ",".join(str(2 * rank) for rank in ranks)}
    targets = list(sd_adapter_targets(*full_size(*SD1), conv=lora.wants_convolutions(arguments)))
    with torch.device("meta"):
        weights = lora.create_network(targets, 100, 1, **arguments).state_dict()
    downs = {key.removesuffix(".lora_down.weight"): value for key, value in weights.items() if "lora_down" in key}
    for block, start in BLOCKS_BY_LDM_NAME.items():
        sizes = {
            (value.ndim == 4 and value.shape[-1] == 3, value.shape[0])
            for name, value in downs.items()
            if name.startswith((f"lora_unet_{start}_", f"lora_unet_{start.replace('attentions', 'resnets')}_"))
        }
        pointwise = {(False, block + 1)} if "downsamplers" not in start else set()
        assert sizes == (set() if block == 12 else pointwise | {(True, 2 * block + 2)}), block
    assert {value.shape[0] for name, value in downs.items() if name.startswith("lora_te_")} == {100}


def test_equal_ranks_for_all_blocks_give_kohyas_plain_file():
    arguments = {"block_dims": ",".join(["4"] * 25)}
    targets = list(sd_adapter_targets(*full_size(*SD1), conv=False))
    with torch.device("meta"):
        network = lora.create_network(targets, 4, 1, **arguments)
    written = [(key, list(value.shape)) for key, value in network.state_dict().items()]
    assert written == list(golden("sd15_default").items())


def test_alpha_keeps_the_kind_of_number_it_was_given():
    text_encoder, _ = full_size(*SD1)
    targets = list(sd_adapter_targets(text_encoder, torch.nn.Module(), conv=False))
    assert lora.create_network(targets, 4, 1).state_dict()[f"{targets[0].name}.alpha"].dtype == torch.int64
    assert lora.create_network(targets, 4, 1.0).state_dict()[f"{targets[0].name}.alpha"].dtype == torch.float32
