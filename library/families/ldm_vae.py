"""The VAE in a single-file checkpoint: its names in the LDM layout, and its configuration read off the shapes."""

import re
from collections.abc import Iterable, Mapping

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from library.errors import UserError
from library.families.checkpoint_files import shape_of
from library.families.parts import Part

VAE_PREFIX = "first_stage_model."

VAE_ATTENTION_NAMES = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def vae_name_in_file(name: str, num_blocks: int) -> str:
    """A diffusers VAE name as the LDM layout spells it (without prefix)."""
    name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    attention = re.fullmatch(r"(.+)\.mid_block\.attentions\.0\.(.+)\.(weight|bias)", name)
    if attention:
        return f"{attention[1]}.mid.attn_1.{VAE_ATTENTION_NAMES[attention[2]]}.{attention[3]}"
    name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{num_blocks - 1 - int(m[1])}.block", name)
    return re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{num_blocks - 1 - int(m[1])}.upsample", name)


def vae_config(weights: Mapping[str, Tensor], prefix: str) -> dict:
    """The VAE's configuration, read from the shapes in the file."""
    names = [name.removeprefix(prefix) for name in weights if name.startswith(prefix)]
    num_blocks = 1 + max(int(n.split(".")[2]) for n in names if n.startswith("encoder.down."))
    layers = 1 + max(int(n.split(".")[4]) for n in names if n.startswith("encoder.down.0.block."))
    widths = [shape_of(weights, f"{prefix}encoder.down.{i}.block.0.conv1.weight")[0] for i in range(num_blocks)]
    return dict(
        block_out_channels=tuple(widths),
        layers_per_block=layers,
        latent_channels=shape_of(weights, f"{prefix}decoder.conv_in.weight")[1],
        down_block_types=("DownEncoderBlock2D",) * num_blocks,
        up_block_types=("UpDecoderBlock2D",) * num_blocks,
        norm_num_groups=min(32, widths[0]),
        sample_size=512,
        scaling_factor=0.18215,
    )


def vae_prefix(weights: Iterable[str]) -> str | None:
    """The prefix of the VAE's names in a file: a whole checkpoint's, none in a VAE file, None where there is no VAE."""
    names = set(weights)
    return next((prefix for prefix in (VAE_PREFIX, "") if f"{prefix}decoder.conv_in.weight" in names), None)


def vae_part(weights: Mapping[str, Tensor]) -> Part:
    prefix = vae_prefix(weights)
    if prefix is None:
        raise UserError("the checkpoint has no VAE of its own; give one with --vae")
    diffusers_names = f"{prefix}encoder.mid_block.resnets.0.conv1.weight" in weights
    if diffusers_names:
        raise UserError("the VAE file has diffusers names; give the folder that holds its config.json instead")
    with torch.device("meta"):
        vae = AutoencoderKL(**vae_config(weights, prefix))
    num_blocks = len(vae.config.block_out_channels)
    return Part(vae, weights, lambda name: prefix + vae_name_in_file(name, num_blocks), "VAE")


def vae_in_file(vae: AutoencoderKL) -> dict[str, Tensor]:
    """The VAE's weights under their names in the LDM layout; the matrices of its attention are 1x1 convolutions."""
    num_blocks = len(vae.config.block_out_channels)
    weights = {}
    for name, value in vae.state_dict().items():
        stored = vae_name_in_file(name, num_blocks)
        is_attention_matrix = ".attn_1." in stored and value.ndim == 2
        weights[VAE_PREFIX + stored] = value[:, :, None, None] if is_attention_matrix else value
    return weights
