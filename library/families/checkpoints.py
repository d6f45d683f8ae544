"""Stable Diffusion models from a single file or a diffusers folder, and written as a single file in the LDM layout."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel
from transformers.utils import logging as transformers_logging

from library.errors import UserError
from library.families.checkpoint_files import open_checkpoint
from library.families.detect import CheckpointInfo
from library.families.ldm_clip import clip_in_file, load_clip
from library.families.ldm_open_clip import load_open_clip, open_clip_in_file
from library.families.ldm_unet import eight_heads, heads_of_64, load_unet, unet_in_file
from library.families.ldm_vae import load_vae, vae_in_file


@dataclass(frozen=True)
class LdmLayout:
    """What differs between the single files of SD 1.x and 2.x."""

    num_heads: Callable[[tuple[int, ...]], tuple[int, ...]]  # of the U-Net's blocks, by their widths
    load_text_encoder: Callable[[Mapping[str, Tensor], torch.dtype], CLIPTextModel]
    text_encoder_in_file: Callable[[CLIPTextModel], dict[str, Tensor]]


LAYOUTS = {  # by kind of checkpoint
    "sd1": LdmLayout(eight_heads, load_clip, clip_in_file),
    "sd2": LdmLayout(heads_of_64, load_open_clip, open_clip_in_file),
}


def load_models(
    checkpoint: CheckpointInfo, separate_vae: str | None, dtype: torch.dtype, vae_dtype: torch.dtype
) -> tuple[CLIPTextModel, AutoencoderKL, UNet2DConditionModel]:
    """Text encoder, VAE and U-Net from a single file or a diffusers folder, the VAE from its own path where given."""
    if checkpoint.is_folder:
        text_encoder = load_part(CLIPTextModel, checkpoint.path / "text_encoder", dtype)
        unet = load_part(UNet2DConditionModel, checkpoint.path / "unet", dtype)
        vae = None if separate_vae else load_part(AutoencoderKL, checkpoint.path / "vae", vae_dtype)
    else:
        weights, layout = open_checkpoint(checkpoint.path), LAYOUTS[checkpoint.kind]
        text_encoder = layout.load_text_encoder(weights, dtype)
        unet = load_unet(weights, dtype, layout.num_heads)
        vae = None if separate_vae else load_vae(weights, vae_dtype)
    return text_encoder, vae or load_separate_vae(Path(separate_vae), vae_dtype), unet


def load_separate_vae(path: Path, dtype: torch.dtype) -> AutoencoderKL:
    """A VAE from its own file, from a whole checkpoint, or from a diffusers folder (of a VAE or of a model)."""
    if not path.is_dir():
        return load_vae(open_checkpoint(path), dtype)
    folder = path if (path / "config.json").is_file() else path / "vae"
    if not (folder / "config.json").is_file():
        raise UserError(f"--vae: the folder {path} has no config.json; give a VAE's folder or file")
    return load_part(AutoencoderKL, folder, dtype)


def load_part(model_class: type, folder: Path, dtype: torch.dtype) -> nn.Module:
    """A component of a diffusers folder, from its fp16 variant where the folder has only that one."""
    if not folder.is_dir():
        raise UserError(f"the model folder {folder.parent} has no {folder.name}")
    names = [path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".bin")]
    variants = [name for name in names if ".fp16." in name]
    variant = "fp16" if variants and len(variants) == len(names) else None
    transformers_logging.disable_progress_bar()
    return model_class.from_pretrained(folder, torch_dtype=dtype, variant=variant, local_files_only=True)


def ldm_state_dict(
    unet: UNet2DConditionModel, vae: AutoencoderKL, text_encoder: CLIPTextModel, kind: str = "sd1"
) -> dict[str, Tensor]:
    """The weights of an SD model under the names of a single-file checkpoint of this kind."""
    return unet_in_file(unet) | vae_in_file(vae) | LAYOUTS[kind].text_encoder_in_file(text_encoder)
