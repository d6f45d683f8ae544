"""OpenAI's CLIP text encoder in a single-file checkpoint: its names, and its configuration read off the shapes."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from library.families.checkpoint_files import shape_of
from library.families.parts import Part

CLIP_PREFIX = "cond_stage_model.transformer."  # of SD 1.x
SDXL_CLIP_PREFIX = "conditioner.embedders.0.transformer."


def with_text_model(weights: Iterable[str], prefix: str) -> str:
    """The prefix and, in nearly every file, `text_model.` behind it."""
    nested = f"{prefix}text_model."
    return nested if any(name.startswith(nested) for name in weights) else prefix


def clip_config(weights: Mapping[str, Tensor], prefix: str) -> CLIPTextConfig:
    """The text encoder's configuration, read from the shapes in the file (heads of 64 features, as all CLIP have)."""
    layers = {
        name.split(".layers.")[1].split(".")[0] for name in weights if name.startswith(f"{prefix}encoder.layers.")
    }
    vocabulary, width = shape_of(weights, f"{prefix}embeddings.token_embedding.weight")
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=shape_of(weights, f"{prefix}encoder.layers.0.mlp.fc1.weight")[0],
        num_hidden_layers=len(layers),
        num_attention_heads=max(1, width // 64),
        max_position_embeddings=shape_of(weights, f"{prefix}embeddings.position_embedding.weight")[0],
        hidden_act="quick_gelu",
        projection_dim=width,
        bos_token_id=49406,
        eos_token_id=49407,
        pad_token_id=49407,
    )


def clip_part(weights: Mapping[str, Tensor], prefix: str = CLIP_PREFIX) -> Part:
    prefix = with_text_model(weights, prefix)
    with torch.device("meta"):
        text_encoder = CLIPTextModel(clip_config(weights, prefix))
    return Part(text_encoder, weights, lambda name: prefix + name.removeprefix("text_model."), "CLIP text encoder")


def clip_in_file(text_encoder: CLIPTextModel, prefix: str = CLIP_PREFIX) -> dict[str, Tensor]:
    """The text encoder's weights under their names in the LDM layout."""
    weights = text_encoder.state_dict().items()
    return {f"{prefix}text_model.{name.removeprefix('text_model.')}": value for name, value in weights}
