"""The OpenCLIP text encoders in single-file checkpoints: their names, and their configuration read off the shapes."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from library.families.checkpoint_files import Target, file_of, loaded, shape_of
from library.families.detect import SD2_TEXT_LAYERS
from library.families.parts import Part

MAX_LOGIT_SCALE = math.log(100)  # where OpenCLIP's training ends; text conditioning does not use it
LAYERS = "transformer.resblocks."

ENDS = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection.T",
}
LAYER_PARTS = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


@dataclass(frozen=True)
class OpenClipFile:
    """Where an OpenCLIP text encoder lies in a file, and what is used of it."""

    prefix: str
    max_layers: int | None  # the first ones, where a file has more than its pictures were trained with
    has_projection: bool

    @property
    def model_class(self) -> type:
        return CLIPTextModelWithProjection if self.has_projection else CLIPTextModel


SD2_OPEN_CLIP = OpenClipFile("cond_stage_model.model.", max_layers=SD2_TEXT_LAYERS, has_projection=False)
SDXL_OPEN_CLIP = OpenClipFile("conditioner.embedders.1.model.", max_layers=None, has_projection=True)


def open_clip_name(name: str) -> str:
    """A transformers name as OpenCLIP spells it (without prefix).

    A third of `in_proj` has .q, .k or .v behind it, and the projection .T: files have it transposed.
    """
    name = name.removeprefix("text_model.")
    if name in ENDS:
        return ENDS[name]
    layer, part, kind = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name).groups()
    third = re.fullmatch(r"self_attn\.([qkv])_proj", part)
    inside = f"attn.in_proj_{kind}.{third[1]}" if third else f"{LAYER_PARTS[part]}.{kind}"
    return f"{LAYERS}{layer}.{inside}"


class TakenApart(Mapping[str, Tensor]):
    """The text encoder's weights, without prefix: queries, keys and values apart, the projection as a Linear has it."""

    def __init__(self, weights: Mapping[str, Tensor], file: OpenClipFile):
        self._weights = weights
        self.file = file_of(weights)
        self._sources: dict[str, tuple[str, str]] = {}  # name -> name in the file, and what to take of it
        for name in weights:
            if not name.startswith(file.prefix):
                continue
            inside = name.removeprefix(file.prefix)
            if re.search(r"\.attn\.in_proj_(weight|bias)$", inside):
                self._sources |= {f"{inside}.{third}": (name, third) for third in "qkv"}
            elif inside == "text_projection":
                self._sources["text_projection.T"] = name, "T"
            else:
                self._sources[inside] = name, ""
        self._last: dict[str, Tensor] = {}  # those of which another third will be wanted

    def __getitem__(self, name: str) -> Tensor:
        source, part = self._sources[name]
        return part_of(self._weights[source], part)

    def __iter__(self):
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)

    def place(self, name: str) -> tuple[str, str]:
        """The name of the weight in the file, and what is taken of it (see `part_of`)."""
        return self._sources[name]

    def shape(self, name: str) -> tuple[int, ...]:
        source, part = self._sources[name]
        shape = shape_of(self._weights, source)
        return shape[::-1] if part == "T" else (shape[0] // 3, *shape[1:]) if part else shape

    def loaded(self, name: str, target: Target) -> Tensor:
        source, part = self._sources[name]
        whole = self._last.pop(source, None)
        if whole is None:
            whole = loaded(self._weights, source, target)
        if part in ("q", "k", "v"):
            self._last = {**self._last, source: whole} if len(self._last) < 2 else {source: whole}
        return part_of(whole, part)


def part_of(weight: Tensor, part: str) -> Tensor:
    """A view of what `TakenApart` takes of a weight: "q", "k" or "v" a third, "T" its transpose, "" all of it."""
    if part == "T":
        return weight.T
    return weight.chunk(3)["qkv".index(part)] if part else weight


def open_clip_config(weights: Mapping[str, Tensor], file: OpenClipFile) -> CLIPTextConfig:
    """The text encoder's configuration, read from the shapes in the file."""
    start = file.prefix + LAYERS
    num_layers = len({name.removeprefix(start).split(".")[0] for name in weights if name.startswith(start)})
    vocabulary, width = shape_of(weights, f"{file.prefix}token_embedding.weight")
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=shape_of(weights, f"{start}0.mlp.c_fc.weight")[0],
        num_hidden_layers=min(num_layers, file.max_layers or num_layers),
        num_attention_heads=max(1, width // 64),
        max_position_embeddings=shape_of(weights, f"{file.prefix}positional_embedding")[0],
        hidden_act="gelu",
        projection_dim=shape_of(weights, f"{file.prefix}text_projection")[1] if file.has_projection else width,
        bos_token_id=49406,
        eos_token_id=49407,
        pad_token_id=0,
    )


def open_clip_part(weights: Mapping[str, Tensor], file: OpenClipFile = SD2_OPEN_CLIP) -> Part:
    with torch.device("meta"):
        text_encoder = file.model_class(open_clip_config(weights, file))
    return Part(text_encoder, TakenApart(weights, file), open_clip_name, "OpenCLIP text encoder")


def open_clip_in_file(text_encoder: CLIPTextModel, file: OpenClipFile = SD2_OPEN_CLIP) -> dict[str, Tensor]:
    """The text encoder's weights under OpenCLIP's names, with stand-ins for what other programs want to find there."""
    apart = {open_clip_name(name): value for name, value in text_encoder.state_dict().items()}
    weights = put_together(apart)
    weights = last_layer_again(weights, file) | unused_ends(weights) | weights
    return {file.prefix + name: value for name, value in weights.items()}


def put_together(apart: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The opposite of `TakenApart`."""
    weights = {}
    for name, value in apart.items():
        whole, _, end = name.rpartition(".")
        if end in ("q", "k", "v"):
            weights[whole] = torch.cat([apart[f"{whole}.{third}"] for third in "qkv"])
        elif end == "T":
            weights[whole] = value.T
        else:
            weights[name] = value
    return weights


def last_layer_again(weights: Mapping[str, Tensor], file: OpenClipFile) -> dict[str, Tensor]:
    """A copy of the last layer that is used as the next one, which files of SD 2.x have; empty for other depths."""
    if file.max_layers is None:
        return {}
    last, added = f"{LAYERS}{file.max_layers - 1}.", f"{LAYERS}{file.max_layers}."
    return {name.replace(last, added): value.clone() for name, value in weights.items() if name.startswith(last)}


def unused_ends(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The projection and the scale that compare texts with pictures; SD 2.x does without them."""
    like = weights["ln_final.weight"]
    kept = dict(dtype=like.dtype, device=like.device)
    return {
        "text_projection": torch.eye(len(like), **kept),
        "logit_scale": torch.full((), MAX_LOGIT_SCALE, **kept),
    }
