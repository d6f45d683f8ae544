"""A base model as adapters see it: where the weight of each layer lies in its files, under the names that files use."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from library.adapters.names import kohya_name
from library.errors import UserError
from library.families.base import AdapterTarget
from library.families.checkpoint_files import SafetensorsReader, Target, file_of, loaded, open_checkpoint
from library.families.checkpoints import LAYOUTS, TextEncoderPart, folder_part
from library.families.detect import CheckpointInfo, inspect_checkpoint
from library.families.ldm_open_clip import TakenApart, part_of
from library.families.ldm_unet import ldm_paths, unet_part
from library.families.modules import in_text_model
from library.families.parts import LoadedPart, Part
from library.families.sd import VERSIONS, sd_adapter_targets
from library.families.sdxl import sdxl_adapter_targets


@dataclass(frozen=True)
class Place:
    """Where a parameter lies in the files of a model."""

    file: Path
    key: str
    part: str  # what it is of the tensor there, see `part_of`
    shape: tuple[int, ...]  # in the layer


@dataclass(frozen=True)
class LayerPlaces:
    weight: Place
    bias: Place | None


class BaseModel:
    """A checkpoint or a diffusers folder, of which only headers are read until a weight is asked for."""

    def __init__(self, checkpoint: CheckpointInfo, flag: str):
        if checkpoint.kind not in LAYOUTS:
            raise UserError(
                f"{flag}: {checkpoint.path} is a {checkpoint.description}; this works with Stable Diffusion 1.x, 2.x "
                "and XL models"
            )
        self.path = Path(os.path.abspath(checkpoint.path))
        self.kind, self.is_folder = checkpoint.kind, checkpoint.is_folder
        self.files: dict[Path, Mapping[str, Tensor]] = {}
        layout = LAYOUTS[self.kind]
        if self.is_folder:
            self.text_encoders = [self._of_folder(part.folder, part) for part in layout.text_encoders]
            self.unet = self._of_folder("unet")
        else:
            weights = self.files[self.path] = open_checkpoint(self.path, mapped=False)
            self.text_encoders = [part.open(weights) for part in layout.text_encoders]
            self.unet = unet_part(weights, layout.num_heads)
        self.layers = dict(self._layers())

    def find(self, name: str) -> LayerPlaces | None:
        """Where the layer of this name, spelled in any of the usual ways, is; None where there is none."""
        return self.layers.get(name) or self.layers.get(kohya_name(name))

    def read(self, place: Place, dtype: torch.dtype = torch.float32) -> Tensor:
        whole = loaded(self.files[place.file], place.key, Target(dtype))
        return part_of(whole, place.part).reshape(place.shape)

    def targets(self, conv: bool) -> Iterator[AdapterTarget]:
        """The layers that kohya's networks adapt, under their names; `conv` as in `--network_args conv_dim`."""
        texts = [part.layers for part in self.text_encoders]
        if self.kind in VERSIONS:
            return sd_adapter_targets(texts[0], self.unet.layers, conv)
        return sdxl_adapter_targets(texts, self.unet.layers, conv)

    def _of_folder(self, name: str, text: TextEncoderPart | None = None) -> Part:
        part = folder_part(text.model_class if text else UNet2DConditionModel, self.path / name)
        if isinstance(part, LoadedPart):
            raise UserError(f"{self.path / name} has its weights not in one .safetensors file; convert the model first")
        return part

    def _layers(self) -> Iterator[tuple[str, LayerPlaces]]:
        """Every layer with a weight, under all its names."""
        ldm_path = ldm_paths(self.unet.layers)
        for path, places in self._places(self.unet):
            for spelled in (path, ldm_path(path)):
                if spelled:
                    yield f"lora_unet_{spelled}".replace(".", "_"), places
        for number, part in enumerate(self.text_encoders, start=1):
            prefixes = [f"lora_te{number}_"] + (["lora_te_"] if len(self.text_encoders) == 1 else [])
            for path, places in self._places(part):
                for prefix in prefixes:
                    for spelled in {path, in_text_model(path)}:
                        yield f"{prefix}{spelled}".replace(".", "_"), places

    def _places(self, part: Part) -> Iterator[tuple[str, LayerPlaces]]:
        for path, layer in part.layers.named_modules():
            if isinstance(getattr(layer, "weight", None), nn.Parameter):
                weight, bias = self._place(part, f"{path}.weight", layer.weight.shape), getattr(layer, "bias", None)
                yield path, LayerPlaces(weight, None if bias is None else self._place(part, f"{path}.bias", bias.shape))

    def _place(self, part: Part, name: str, shape: torch.Size) -> Place:
        weights, key = part.source(name)
        file = Path(file_of(weights).path) if self.is_folder else self.path
        if self.is_folder and file not in self.files:
            self.files[file] = SafetensorsReader(file, mapped=False)
        taken = ""
        if isinstance(weights, TakenApart):
            key, taken = weights.place(key)
        return Place(file, key, taken, tuple(shape))


def open_base_model(path: str, flag: str) -> BaseModel:
    return BaseModel(inspect_checkpoint(path, flag), flag)
