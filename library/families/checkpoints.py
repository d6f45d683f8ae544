"""Stable Diffusion models from a single file or a diffusers folder, and written as a single file in the LDM layout."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL, ModelMixin, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
from transformers.utils import logging as transformers_logging

from library.errors import UserError, first_line
from library.families.checkpoint_files import Target, open_checkpoint
from library.families.detect import CheckpointInfo
from library.families.ldm_clip import SDXL_CLIP_PREFIX, clip_in_file, clip_part
from library.families.ldm_open_clip import SDXL_OPEN_CLIP, open_clip_in_file, open_clip_part
from library.families.ldm_unet import eight_heads, heads_of_64, unet_in_file, unet_part
from library.families.ldm_vae import vae_in_file, vae_part
from library.families.parts import Hold, LoadedPart, Part
from library.layers.swapped import blocks_of, largest_blocks, weights_of
from library.options.groups import ModelOptions
from library.texts import read_json

logger = logging.getLogger(__name__)

WEIGHTS_NAMES = {  # by class: the file of a component, without its ending
    UNet2DConditionModel: "diffusion_pytorch_model",
    AutoencoderKL: "diffusion_pytorch_model",
    CLIPTextModel: "model",
    CLIPTextModelWithProjection: "model",
}


@dataclass(frozen=True)
class TextEncoderPart:
    """A text encoder of a model: its folder and class in diffusers' layout, and how single files have it."""

    folder: str
    model_class: type
    open: Callable[[Mapping[str, Tensor]], Part]
    in_file: Callable[[nn.Module], dict[str, Tensor]]


@dataclass(frozen=True)
class LdmLayout:
    """What differs between the models of this kind."""

    num_heads: Callable[[tuple[int, ...]], tuple[int, ...]]  # of the U-Net's blocks, by their widths
    text_encoders: tuple[TextEncoderPart, ...]


SD1_TEXT = TextEncoderPart("text_encoder", CLIPTextModel, clip_part, clip_in_file)
SD2_TEXT = TextEncoderPart("text_encoder", CLIPTextModel, open_clip_part, open_clip_in_file)
SDXL_TEXT_1 = TextEncoderPart(
    "text_encoder",
    CLIPTextModel,
    partial(clip_part, prefix=SDXL_CLIP_PREFIX),
    partial(clip_in_file, prefix=SDXL_CLIP_PREFIX),
)
SDXL_TEXT_2 = TextEncoderPart(
    "text_encoder_2",
    CLIPTextModelWithProjection,
    partial(open_clip_part, file=SDXL_OPEN_CLIP),
    partial(open_clip_in_file, file=SDXL_OPEN_CLIP),
)
LAYOUTS = {  # by kind of checkpoint
    "sd1": LdmLayout(eight_heads, (SD1_TEXT,)),
    "sd2": LdmLayout(heads_of_64, (SD2_TEXT,)),
    "sdxl": LdmLayout(heads_of_64, (SDXL_TEXT_1, SDXL_TEXT_2)),
}


class Models(NamedTuple):
    """The parts of a Stable Diffusion model."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoders: tuple[nn.Module, ...]


@dataclass(frozen=True)
class OpenedModels:
    """The parts of a model that is opened and found complete, before any weight is read."""

    unet: Part
    vae: Part
    text_encoders: tuple[Part, ...]

    def all(self) -> tuple[Part, ...]:
        return self.unet, self.vae, *self.text_encoders

    def keep_weights(self, target: Target) -> None:
        """Those of U-Net and text encoders from now on."""
        for part in (self.unet, *self.text_encoders):
            part.loaded(target)
            part.keep()

    def change_layers(self, changes: Mapping[nn.Module, Callable[[], None]]) -> None:
        """Those of U-Net and text encoders, as soon as their weights are there."""
        for part in (self.unet, *self.text_encoders):
            for layer in part.layers.modules():
                if layer in changes:
                    part.change(layer, changes[layer])

    def hold_in(self, hold: Hold, text_too: bool) -> None:
        """Have the U-Net, or the text encoders too, rounded as they are read."""
        for part in (self.unet, *(self.text_encoders if text_too else ())):
            part.hold_in(hold)

    def swap_blocks(self, num_blocks: int) -> None:
        """Read the weights of the U-Net's largest blocks no further than to main memory."""
        unet = self.unet.layers
        if num_blocks > (there := len(blocks_of(unet))):
            raise UserError(f"--blocks_to_swap must be at most {there}, the blocks of this U-Net, got {num_blocks}")
        waiting = {id(weight) for block in largest_blocks(unet, num_blocks).values() for weight in weights_of(block)}
        self.unet.read_to_main_memory([name for name, value in unet.named_parameters() if id(value) in waiting])


def open_models(checkpoint: CheckpointInfo, options: ModelOptions) -> OpenedModels:
    """All parts of a single file or a diffusers folder, the VAE from its own path where given."""
    layout = LAYOUTS[checkpoint.kind]
    if checkpoint.is_folder:
        text_encoders = [folder_part(part.model_class, checkpoint.path / part.folder) for part in layout.text_encoders]
        unet = folder_part(UNet2DConditionModel, checkpoint.path / "unet")
        vae = None if options.vae else folder_part(AutoencoderKL, checkpoint.path / "vae")
    else:
        weights = open_checkpoint(checkpoint.path, mapped=not options.disable_mmap_load_safetensors)
        text_encoders = [part.open(weights) for part in layout.text_encoders]
        unet = unet_part(weights, layout.num_heads)
        vae = None if options.vae else vae_part(weights)
    return OpenedModels(unet, vae or separate_vae(options), tuple(text_encoders))


def separate_vae(options: ModelOptions) -> Part:
    """A VAE from its own file, from a whole checkpoint, or from a diffusers folder (of a VAE or of a model)."""
    path = Path(options.vae)
    if not path.is_dir():
        return vae_part(open_checkpoint(path, mapped=not options.disable_mmap_load_safetensors))
    folder = path if (path / "config.json").is_file() else path / "vae"
    if not (folder / "config.json").is_file():
        raise UserError(f"--vae: the folder {path} has no config.json; give a VAE's folder or file")
    return folder_part(AutoencoderKL, folder)


def folder_part(model_class: type, folder: Path) -> Part:
    """A component of a diffusers folder, from its fp16 variant where the folder has only that one.

    What is no single safetensors file with the names of today's classes the libraries load, at once.
    """
    if not folder.is_dir():
        raise UserError(f"the model folder {folder.parent} has no {folder.name}")
    names = [path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".bin")]
    variants = [name for name in names if ".fp16." in name]
    variant = "fp16" if variants and len(variants) == len(names) else None
    _require_config(folder / "config.json")
    try:
        file = folder / f"{WEIGHTS_NAMES[model_class]}{'.fp16' if variant else ''}.safetensors"
        if file.is_file():
            return part_of_file(model_class, file)
    except Exception as error:  # of any kind, on damaged files; what is wrong is told below
        logger.debug("%s is left to %s: %s", folder, model_class.__name__, error)
    return LoadedPart(loaded_by_library(model_class, folder, variant))


def part_of_file(model_class: type, file: Path) -> Part:
    with torch.device("meta"):
        if issubclass(model_class, ModelMixin):
            layers = model_class.from_config(model_class.load_config(file.parent, local_files_only=True))
        else:
            layers = model_class(CLIPTextConfig.from_pretrained(file.parent, local_files_only=True))
    weights = open_checkpoint(file)
    return Part(layers, weights, lambda name: name if name in weights else f"text_model.{name}", model_class.__name__)


def loaded_by_library(model_class: type, folder: Path, variant: str | None) -> nn.Module:
    transformers_logging.disable_progress_bar()
    try:
        model, report = model_class.from_pretrained(
            folder, variant=variant, local_files_only=True, output_loading_info=True
        )
    except MemoryError:
        raise
    except Exception as error:  # the libraries raise many kinds on damaged files
        raise UserError(f"the model folder {folder} cannot be loaded: {first_line(error)}") from error
    if missing := sorted(report["missing_keys"]):  # the libraries would make them up
        raise UserError(f"the model folder {folder} is not complete: weights are missing, e.g. {missing[0]}")
    return model


def _require_config(path: Path) -> None:
    """UserError unless a file is a JSON object: diffusers takes a text in it for the name of a model to download."""
    try:
        is_config = isinstance(read_json(path.read_text(encoding="utf-8")), dict)
    except (OSError, ValueError):
        is_config = False
    if not is_config:
        raise UserError(f"{path} is missing or broken; get the model again")


def ldm_state_dict(models: Models, kind: str = "sd1") -> dict[str, Tensor]:
    """The weights of a model under the names of a single-file checkpoint of this kind."""
    weights = unet_in_file(models.unet) | vae_in_file(models.vae)
    for part, text_encoder in zip(LAYOUTS[kind].text_encoders, models.text_encoders, strict=True):
        weights |= part.in_file(text_encoder)
    return weights
