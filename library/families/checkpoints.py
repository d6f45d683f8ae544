"""Stable Diffusion models from a single file or a diffusers folder, and written as a single file in the LDM layout."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection
from transformers.utils import logging as transformers_logging

from library.errors import UserError, first_line
from library.families.checkpoint_files import Target, open_checkpoint
from library.families.detect import CheckpointInfo
from library.families.ldm_clip import SDXL_CLIP_PREFIX, clip_in_file, load_clip
from library.families.ldm_open_clip import SDXL_OPEN_CLIP, load_open_clip, open_clip_in_file
from library.families.ldm_unet import eight_heads, heads_of_64, load_unet, unet_in_file
from library.families.ldm_vae import load_vae, vae_in_file
from library.options.groups import ModelOptions
from library.texts import read_json


@dataclass(frozen=True)
class TextEncoderPart:
    """A text encoder of a model: its folder and class in diffusers' layout, and how single files have it."""

    folder: str
    model_class: type
    load: Callable[[Mapping[str, Tensor], Target], nn.Module]
    in_file: Callable[[nn.Module], dict[str, Tensor]]


@dataclass(frozen=True)
class LdmLayout:
    """What differs between the models of this kind."""

    num_heads: Callable[[tuple[int, ...]], tuple[int, ...]]  # of the U-Net's blocks, by their widths
    text_encoders: tuple[TextEncoderPart, ...]


SD1_TEXT = TextEncoderPart("text_encoder", CLIPTextModel, load_clip, clip_in_file)
SD2_TEXT = TextEncoderPart("text_encoder", CLIPTextModel, load_open_clip, open_clip_in_file)
SDXL_TEXT_1 = TextEncoderPart(
    "text_encoder",
    CLIPTextModel,
    partial(load_clip, prefix=SDXL_CLIP_PREFIX),
    partial(clip_in_file, prefix=SDXL_CLIP_PREFIX),
)
SDXL_TEXT_2 = TextEncoderPart(
    "text_encoder_2",
    CLIPTextModelWithProjection,
    partial(load_open_clip, file=SDXL_OPEN_CLIP),
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


def load_models(checkpoint: CheckpointInfo, options: ModelOptions, target: Target) -> Models:
    """All parts from a single file or a diffusers folder, the VAE from its own path where given.

    The VAE stays on the CPU until it is used.
    """
    layout = LAYOUTS[checkpoint.kind]
    vae_target = Target(torch.float32 if options.no_half_vae else target.dtype)
    if checkpoint.is_folder:
        text_encoders = [
            load_part(part.model_class, checkpoint.path / part.folder, target) for part in layout.text_encoders
        ]
        unet = load_part(UNet2DConditionModel, checkpoint.path / "unet", target)
        vae = None if options.vae else load_part(AutoencoderKL, checkpoint.path / "vae", vae_target)
    else:
        weights = open_checkpoint(checkpoint.path, mapped=not options.disable_mmap_load_safetensors)
        text_encoders = [part.load(weights, target) for part in layout.text_encoders]
        unet = load_unet(weights, target, layout.num_heads)
        vae = None if options.vae else load_vae(weights, vae_target)
    models = Models(unet, vae or load_separate_vae(options, vae_target), tuple(text_encoders))
    for model in (models.unet, models.vae, *models.text_encoders):
        model.requires_grad_(False).eval()
    return models


def load_separate_vae(options: ModelOptions, target: Target) -> AutoencoderKL:
    """A VAE from its own file, from a whole checkpoint, or from a diffusers folder (of a VAE or of a model)."""
    path = Path(options.vae)
    if not path.is_dir():
        return load_vae(open_checkpoint(path, mapped=not options.disable_mmap_load_safetensors), target)
    folder = path if (path / "config.json").is_file() else path / "vae"
    if not (folder / "config.json").is_file():
        raise UserError(f"--vae: the folder {path} has no config.json; give a VAE's folder or file")
    return load_part(AutoencoderKL, folder, target)


def load_part(model_class: type, folder: Path, target: Target) -> nn.Module:
    """A component of a diffusers folder, from its fp16 variant where the folder has only that one."""
    if not folder.is_dir():
        raise UserError(f"the model folder {folder.parent} has no {folder.name}")
    names = [path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".bin")]
    variants = [name for name in names if ".fp16." in name]
    variant = "fp16" if variants and len(variants) == len(names) else None
    _require_config(folder / "config.json")
    transformers_logging.disable_progress_bar()
    try:
        model = model_class.from_pretrained(folder, torch_dtype=target.dtype, variant=variant, local_files_only=True)
    except MemoryError:
        raise
    except Exception as error:  # the libraries raise many kinds on damaged files
        raise UserError(f"the model folder {folder} cannot be loaded: {first_line(error)}") from error
    return model.to(target.device)


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
