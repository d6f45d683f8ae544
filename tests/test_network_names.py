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


@pytest.fixture(scope="module")
def full_size():
    """SD 1.5 as it is, without memory for its weights."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
        )
    return text_encoder, unet


@pytest.mark.parametrize(("name", "arguments"), [("sd15_default", {}), ("sd15_conv", {"conv_dim": "4"})])
def test_lora_keys_equal_kohyas_in_order(full_size, name, arguments):
    text_encoder, unet = full_size
    targets = list(sd_adapter_targets(text_encoder, unet, conv=lora.wants_convolutions(arguments)))
    with torch.device("meta"):
        network = lora.create_network(targets, 4, 1, **arguments)
    written = [(key, list(value.shape)) for key, value in network.state_dict().items()]
    assert written == list(golden(name).items())


def test_alpha_keeps_the_kind_of_number_it_was_given(full_size):
    text_encoder, _ = full_size
    targets = list(sd_adapter_targets(text_encoder, torch.nn.Module(), conv=False))
    assert lora.create_network(targets, 4, 1).state_dict()[f"{targets[0].name}.alpha"].dtype == torch.int64
    assert lora.create_network(targets, 4, 1.0).state_dict()[f"{targets[0].name}.alpha"].dtype == torch.float32
