"""The layers that the models have, by name, without a model. Needs no torch."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from library.families.ldm_names import unet_name_in_file

LAYERS_PER_BLOCK = 2
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_LAYERS = (
    *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")),
    *("mlp.fc1", "mlp.fc2", "layer_norm1", "layer_norm2"),
)


@dataclass(frozen=True)
class LayerName:
    """A layer that has a weight."""

    part: str  # "unet", "te", "te1", "te2"
    path: str  # in the models of diffusers and transformers: "down_blocks.0.resnets.0.conv1"
    ldm_path: str | None = None  # of U-Nets: "input_blocks.1.0.in_layers.2"

    @property
    def is_norm(self) -> bool:
        return "norm" in self.path.rpartition(".")[2]


@dataclass(frozen=True)
class Architecture:
    """What decides which layers a model has."""

    text_encoders: dict[str, int]  # their layers, by part
    widths: tuple[int, ...]  # of the U-Net's blocks, as they go down
    depths: tuple[int, ...]  # transformer blocks in each attention of them; 0 where a block has none
    embeds_sizes: bool = False

    @property
    def num_attended(self) -> tuple[bool, ...]:
        """Whether each block that goes up has attention."""
        return tuple(depth > 0 for depth in reversed(self.depths))


SD_WIDTHS = 320, 640, 1280, 1280
ARCHITECTURES = {  # by kind of checkpoint
    "sd1": Architecture({"te": 12}, SD_WIDTHS, (1, 1, 1, 0)),
    "sd2": Architecture({"te": 23}, SD_WIDTHS, (1, 1, 1, 0)),
    "sdxl": Architecture({"te1": 12, "te2": 32}, (320, 640, 1280), (0, 2, 10), embeds_sizes=True),
}


@cache
def layers_of_kind(kind: str) -> tuple[LayerName, ...]:
    """The layers of the models of a kind, text encoders first."""
    return tuple(layer_names(ARCHITECTURES[kind]))


def layer_names(architecture: Architecture) -> Iterator[LayerName]:
    for part, num_layers in architecture.text_encoders.items():
        for number in range(num_layers):
            for name in TEXT_LAYERS:
                yield LayerName(part, f"text_model.encoder.layers.{number}.{name}")
        yield LayerName(part, "text_model.final_layer_norm")
    for path in _unet_paths(architecture):
        ldm = unet_name_in_file(f"{path}.weight", LAYERS_PER_BLOCK, architecture.num_attended)
        yield LayerName("unet", path, ldm.removesuffix(".weight"))


def _unet_paths(architecture: Architecture) -> Iterator[str]:
    yield from ("conv_in", "conv_norm_out", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2")
    if architecture.embeds_sizes:
        yield from ("add_embedding.linear_1", "add_embedding.linear_2")
    last = len(architecture.widths) - 1
    for block, depth in enumerate(architecture.depths):
        widens = block > 0 and architecture.widths[block] != architecture.widths[block - 1]
        for index in range(LAYERS_PER_BLOCK):
            yield from _resnet(f"down_blocks.{block}.resnets.{index}", widens and index == 0)
            yield from _attention(f"down_blocks.{block}.attentions.{index}", depth)
        if block < last:
            yield f"down_blocks.{block}.downsamplers.0.conv"
    yield from _resnet("mid_block.resnets.0", False)
    yield from _attention("mid_block.attentions.0", architecture.depths[-1] or 1)
    yield from _resnet("mid_block.resnets.1", False)
    for block, depth in enumerate(reversed(architecture.depths)):
        for index in range(LAYERS_PER_BLOCK + 1):
            yield from _resnet(f"up_blocks.{block}.resnets.{index}", True)
            yield from _attention(f"up_blocks.{block}.attentions.{index}", depth)
        if block < last:
            yield f"up_blocks.{block}.upsamplers.0.conv"


def _resnet(path: str, has_shortcut: bool) -> Iterator[str]:
    for name in ("norm1", "conv1", "time_emb_proj", "norm2", "conv2", *["conv_shortcut"] * has_shortcut):
        yield f"{path}.{name}"


def _attention(path: str, depth: int) -> Iterator[str]:
    if not depth:
        return
    yield from (f"{path}.norm", f"{path}.proj_in")
    for number in range(depth):
        block = f"{path}.transformer_blocks.{number}"
        yield from (f"{block}.norm{index}" for index in (1, 2, 3))
        yield from (f"{block}.{attention}.{name}" for attention in ("attn1", "attn2") for name in ATTENTION)
        yield from (f"{block}.ff.net.0.proj", f"{block}.ff.net.2")
    yield f"{path}.proj_out"
