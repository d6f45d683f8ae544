"""The OpenCLIP text encoder in a single-file checkpoint of SD 2.x: its names, and its configuration by the shapes.

The file has 24 layers, and the pictures were trained with the output of the 23rd: the model is built with 23.
"""

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from library.families.checkpoint_files import fill, shape_of
from library.families.ldm_clip import restore_position_ids

OPEN_CLIP_PREFIX = "cond_stage_model.model."
LAYERS_PREFIX = f"{OPEN_CLIP_PREFIX}transformer.resblocks."
NUM_LAYERS = 23
MAX_LOGIT_SCALE = math.log(100)  # where OpenCLIP's training ends; text conditioning does not use it

ENDS = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
LAYER_PARTS = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def open_clip_name(name: str) -> str:
    """A transformers name as OpenCLIP spells it (without prefix); a third of `in_proj` has .q, .k or .v behind it."""
    name = name.removeprefix("text_model.")
    if name in ENDS:
        return ENDS[name]
    layer, part, kind = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name).groups()
    third = re.fullmatch(r"self_attn\.([qkv])_proj", part)
    inside = f"attn.in_proj_{kind}.{third[1]}" if third else f"{LAYER_PARTS[part]}.{kind}"
    return f"transformer.resblocks.{layer}.{inside}"


def with_thirds(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The text encoder's weights, those of queries, keys and values apart; the layer that is not used is not read."""
    apart = {}
    for name in weights:
        layer = re.match(re.escape(LAYERS_PREFIX) + r"(\d+)\.", name)
        if not name.startswith(OPEN_CLIP_PREFIX) or (layer and int(layer[1]) >= NUM_LAYERS):
            continue
        if re.search(r"\.attn\.in_proj_(weight|bias)$", name):
            apart |= {f"{name}.{third}": part for third, part in zip("qkv", weights[name].chunk(3), strict=True)}
        else:
            apart[name] = weights[name]
    return apart


def open_clip_config(weights: Mapping[str, Tensor]) -> CLIPTextConfig:
    """The text encoder's configuration, read from the shapes in the file."""
    layers = {name.removeprefix(LAYERS_PREFIX).split(".")[0] for name in weights if name.startswith(LAYERS_PREFIX)}
    vocabulary, width = shape_of(weights, f"{OPEN_CLIP_PREFIX}token_embedding.weight")
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=shape_of(weights, f"{LAYERS_PREFIX}0.mlp.c_fc.weight")[0],
        num_hidden_layers=min(len(layers), NUM_LAYERS),
        num_attention_heads=max(1, width // 64),
        max_position_embeddings=shape_of(weights, f"{OPEN_CLIP_PREFIX}positional_embedding")[0],
        hidden_act="gelu",
        projection_dim=width,
        bos_token_id=49406,
        eos_token_id=49407,
        pad_token_id=0,
    )


def load_open_clip(weights: Mapping[str, Tensor], dtype: torch.dtype) -> CLIPTextModel:
    with torch.device("meta"):
        text_encoder = CLIPTextModel(open_clip_config(weights))
    apart = with_thirds(weights)
    fill(text_encoder, apart, lambda name: OPEN_CLIP_PREFIX + open_clip_name(name), dtype, "OpenCLIP text encoder")
    restore_position_ids(text_encoder)
    return text_encoder


def open_clip_in_file(text_encoder: CLIPTextModel) -> dict[str, Tensor]:
    """The text encoder's weights under OpenCLIP's names, with stand-ins for what other programs want to find there."""
    apart = {OPEN_CLIP_PREFIX + open_clip_name(name): value for name, value in text_encoder.state_dict().items()}
    weights = with_whole_projections(apart)
    return last_layer_again(weights) | weights | unused_ends(weights)


def with_whole_projections(apart: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The opposite of `with_thirds`."""
    weights = {}
    for name, value in apart.items():
        whole, _, third = name.rpartition(".")
        if third in ("q", "k", "v"):
            weights[whole] = torch.cat([apart[f"{whole}.{third}"] for third in "qkv"])
        else:
            weights[name] = value
    return weights


def last_layer_again(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A copy of the 23rd layer as the 24th, which files have and nobody uses; empty for models of another depth."""
    last, added = f"{LAYERS_PREFIX}{NUM_LAYERS - 1}.", f"{LAYERS_PREFIX}{NUM_LAYERS}."
    return {name.replace(last, added): value.clone() for name, value in weights.items() if name.startswith(last)}


def unused_ends(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The projection and the scale that compare texts with pictures; conditioning does without them."""
    like = weights[f"{OPEN_CLIP_PREFIX}ln_final.weight"]
    kept = dict(dtype=like.dtype, device=like.device)
    return {
        f"{OPEN_CLIP_PREFIX}text_projection": torch.eye(len(like), **kept),
        f"{OPEN_CLIP_PREFIX}logit_scale": torch.full((), MAX_LOGIT_SCALE, **kept),
    }
