"""The names and shapes in files are a contract: they equal those that kohya's scripts write, in the same order."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from library.families.sd import sd_adapter_targets
from networks import lora

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


def test_alpha_keeps_the_kind_of_number_it_was_given():
    text_encoder, _ = full_size(*SD1)
    targets = list(sd_adapter_targets(text_encoder, torch.nn.Module(), conv=False))
    assert lora.create_network(targets, 4, 1).state_dict()[f"{targets[0].name}.alpha"].dtype == torch.int64
    assert lora.create_network(targets, 4, 1.0).state_dict()[f"{targets[0].name}.alpha"].dtype == torch.float32
