"""What families do with the modules of diffusers and transformers: find layers to adapt, switch on checkpointing."""

import re
from collections.abc import Iterable, Iterator

from diffusers import UNet2DConditionModel
from torch import nn
from transformers import PreTrainedModel

from library.families.base import Checkpoint
from library.layers.unet_blocks import keep_inputs

TEXT_CLASSES = ("CLIPAttention", "CLIPSdpaAttention", "CLIPMLP")
UNET_CLASSES = ("Transformer2DModel",)
UNET_CONV_CLASSES = ("ResnetBlock2D", "Downsample2D", "Upsample2D")
# Attention has another name in kohya's U-Nets. The time embedding has not, but LyCORIS 4.1 means another model's class
# by that name, takes these layers twice, and stops.
KOHYA_UNET_CLASSES = {"Attention": "CrossAttention", "TimestepEmbedding": "TimeEmbedding"}


def checkpoint_gradients(
    unet: UNet2DConditionModel, text_encoders: Iterable[PreTrainedModel], checkpoint: Checkpoint | None
) -> None:
    """Recompute activations in the backward pass, those of the U-Net's blocks in the way given.

    Needs train mode, which changes nothing else in these models.
    """
    unet.enable_gradient_checkpointing(checkpoint)
    keep_inputs(unet)
    unet.train()
    for text_encoder in text_encoders:
        text_encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        text_encoder.train()


def text_layers(text_encoder: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers of a CLIP text encoder that kohya's networks adapt, in its order, by their paths there."""
    for path, layer in layers_inside(text_encoder, TEXT_CLASSES):
        yield in_text_model(path), layer


def unet_layers(unet: nn.Module, conv: bool) -> Iterator[tuple[str, nn.Module]]:
    """Those of a U-Net by their paths: its transformers (Linear and 1x1), with `conv` residual blocks and samplers."""
    return layers_inside(unet, UNET_CLASSES + (UNET_CONV_CLASSES if conv else ()))


def layers_inside(model: nn.Module, class_names: tuple[str, ...]) -> Iterator[tuple[str, nn.Module]]:
    """Paths and layers (Linear, Conv2d) inside modules of the named classes, in kohya's order."""
    for parent_path, parent in model.named_modules():
        if type(parent).__name__ not in class_names:
            continue
        inside = [(n, m) for n, m in parent.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
        for name, layer in sorted(inside, key=lambda pair: transformer_position(pair[0])):
            yield f"{parent_path}.{name}", layer


def unet_norms(unet: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The norms of a U-Net's transformers and residual blocks by their paths."""
    classes = UNET_CLASSES + UNET_CONV_CLASSES
    inside = [f"{path}." for path, module in unet.named_modules() if type(module).__name__ in classes]
    for path, module in unet.named_modules():
        if isinstance(module, (nn.GroupNorm, nn.LayerNorm)) and path.startswith(tuple(inside)):
            yield path, module


def shared_input(path: str) -> str | None:
    """A name for what a layer reads that reads it together with others: queries, keys and values do in attention."""
    match = re.fullmatch(r"(.+\.(?:attn1\.to_[qkv]|attn2\.to_[kv]|self_attn\.[qkv]_proj))", path)
    return path.rpartition(".")[0] if match else None


def transformer_position(name: str) -> tuple[int, int, int]:
    """Where a layer of a Transformer2DModel stands in a kohya file; its feed-forward comes before cross-attention."""
    match = re.match(r"transformer_blocks\.(\d+)\.(attn1|ff|attn2)\.", name)
    if match:
        return 1, int(match[1]), ("attn1", "ff", "attn2").index(match[2])
    return (2 if name == "proj_out" else 0), 0, 0


def in_text_model(path: str) -> str:
    """A module's path with the outermost level that transformers 5.6 dropped."""
    return path if path.partition(".")[0] == "text_model" else f"text_model.{path}"
