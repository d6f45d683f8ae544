"""Single-file checkpoints in the LDM layout: their names, their configs, and models filled from them.

A model is built on the meta device and given the file's own (memory-mapped) tensors, so nothing is initialised at
random first and nothing is read that is not used. Names are mapped from diffusers to the file, so that every weight of
the model is accounted for.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from library.errors import UserError, quoted_list

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
SD1_TEXT_PREFIX = "cond_stage_model.transformer."


class SafetensorsReader(Mapping[str, Tensor]):
    """The tensors of a safetensors file, each read from the memory-mapped file when asked for."""

    def __init__(self, path: Path):
        try:
            self._file = safe_open(str(path), framework="pt")
        except SafetensorError as error:
            raise UserError(f"{path} is not a whole safetensors file ({error}); get it again") from error
        self._names = dict.fromkeys(self._file.keys())

    def __getitem__(self, name: str) -> Tensor:
        return self._file.get_tensor(name)

    def __iter__(self):
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(name).get_shape())


def open_checkpoint(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a checkpoint file by name; pickles are loaded weights-only, so none of their code runs."""
    if path.suffix.lower() == ".safetensors":
        return SafetensorsReader(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise UserError(
            f"{path} cannot be loaded safely: it is damaged or holds more than weights; "
            "get the .safetensors version of this model"
        ) from error
    weights = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else {}
    return {name: value for name, value in weights.items() if isinstance(value, Tensor)}


def shape_of(weights: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    if name not in weights:
        raise UserError(f"the checkpoint is not complete: it has no {name}")
    return weights.shape(name) if isinstance(weights, SafetensorsReader) else tuple(weights[name].shape)


def fill(
    model: nn.Module, weights: Mapping[str, Tensor], name_in_file: Callable[[str], str], dtype: torch.dtype, what: str
) -> None:
    """Give a model on the meta device its weights from a file, in `dtype`; every one must be there and fit."""
    filled, missing, misshapen = {}, [], []
    for name, empty in model.state_dict().items():
        source = name_in_file(name)
        if source not in weights:
            missing.append(source)
            continue
        value = weights[source]
        if value.numel() != empty.numel():
            misshapen.append(f"{source} {tuple(value.shape)} instead of {tuple(empty.shape)}")
            continue
        filled[name] = value.reshape(empty.shape).to(dtype)
    if missing:
        raise UserError(f"the checkpoint has no {what}: {len(missing)} weights are missing, e.g. {missing[0]}")
    if misshapen:
        raise UserError(f"the checkpoint's {what} has weights of other sizes: {quoted_list(misshapen, 3)}")
    model.load_state_dict(filled, assign=True)


# --- U-Net -----------------------------------------------------------------------------------------------------------

RESNET_NAMES = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}


def unet_name_in_file(name: str, layers_per_block: int, num_attended: tuple[bool, ...] = ()) -> str:
    """A diffusers U-Net name as the LDM layout spells it (without prefix).

    `num_attended` tells for every up block whether it has attention (the upsampler's number depends on it).
    """
    for ours, theirs in UNET_ENDS.items():
        if name.startswith(ours + "."):
            return _resnet_name(theirs + name[len(ours) :])
    block, rest = re.fullmatch(r"(?:down|up)_blocks\.(\d+)\.(.+)", name).groups()
    block = int(block)
    kind, index, rest = re.fullmatch(r"(\w+)\.(\d+)\.(.+)", rest).groups()
    if name.startswith("down"):
        position = 1 + block * (layers_per_block + 1)
        if kind == "downsamplers":
            return f"input_blocks.{position + layers_per_block}.0.op.{rest.removeprefix('conv.')}"
        stem = f"input_blocks.{position + int(index)}"
    else:
        position = block * (layers_per_block + 1)
        if kind == "upsamplers":
            return f"output_blocks.{position + layers_per_block}.{2 if num_attended[block] else 1}.{rest}"
        stem = f"output_blocks.{position + int(index)}"
    return _resnet_name(f"{stem}.{0 if kind == 'resnets' else 1}.{rest}")


def _resnet_name(name: str) -> str:
    for ours, theirs in RESNET_NAMES.items():
        head, found, tail = name.partition(f".{ours}.")
        if found and ".transformer_blocks." not in head:
            return f"{head}.{theirs}.{tail}"
    return name


def unet_config(weights: Mapping[str, Tensor]) -> dict:
    """The U-Net's configuration, read from the shapes in the file (heads as SD 1.x has them)."""
    names = [name.removeprefix(UNET_PREFIX) for name in weights if name.startswith(UNET_PREFIX)]

    def shape(name: str) -> tuple[int, ...]:
        return shape_of(weights, UNET_PREFIX + name)

    present = set(names)
    downsamplers = sorted(int(n.split(".")[1]) for n in names if re.fullmatch(r"input_blocks\.\d+\.0\.op\.weight", n))
    if not downsamplers:
        raise UserError("the checkpoint has no Stable Diffusion U-Net")
    layers_per_block = downsamplers[0] - 1
    num_blocks = len(downsamplers) + 1
    widths, attended = [], []
    for block in range(num_blocks):
        first = 1 + block * (layers_per_block + 1)
        widths.append(shape(f"input_blocks.{first}.0.in_layers.2.weight")[0])
        attended.append(f"input_blocks.{first}.1.norm.weight" in present)
    first_attention = next(n for n in names if n.endswith("attn2.to_k.weight"))
    projection = next(n for n in names if n.endswith(".proj_in.weight"))
    return dict(
        sample_size=64,
        in_channels=shape("input_blocks.0.0.weight")[1],
        out_channels=shape("out.2.weight")[0],
        block_out_channels=tuple(widths),
        layers_per_block=layers_per_block,
        down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attended),
        up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attended)),
        cross_attention_dim=shape(first_attention)[1],
        attention_head_dim=8,
        use_linear_projection=len(shape(projection)) == 2,
    )


def unet_naming(unet: UNet2DConditionModel) -> Callable[[str], str]:
    """How this U-Net's names are spelled in an LDM file (without prefix)."""
    attended = tuple(kind.startswith("CrossAttn") for kind in unet.config.up_block_types)
    layers = unet.config.layers_per_block
    return lambda name: unet_name_in_file(name, layers, attended)


def load_unet(weights: Mapping[str, Tensor], dtype: torch.dtype) -> UNet2DConditionModel:
    config = unet_config(weights)
    if config["in_channels"] != 4:  # seen here only of pickles, whose shapes are not known before
        raise UserError(f"the checkpoint is an inpainting model: its U-Net has {config['in_channels']} input channels")
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    naming = unet_naming(unet)
    fill(unet, weights, lambda name: UNET_PREFIX + naming(name), dtype, "Stable Diffusion U-Net")
    return unet


# --- VAE -------------------------------------------------------------------------------------------------------------

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


def load_vae(weights: Mapping[str, Tensor], dtype: torch.dtype) -> AutoencoderKL:
    prefix = vae_prefix(weights)
    if prefix is None:
        raise UserError("the checkpoint has no VAE of its own; give one with --vae")
    diffusers_names = f"{prefix}encoder.mid_block.resnets.0.conv1.weight" in weights
    if diffusers_names:
        raise UserError("the VAE file has diffusers names; give the folder that holds its config.json instead")
    with torch.device("meta"):
        vae = AutoencoderKL(**vae_config(weights, prefix))
    num_blocks = len(vae.config.block_out_channels)
    fill(vae, weights, lambda name: prefix + vae_name_in_file(name, num_blocks), dtype, "VAE")
    return vae


# --- CLIP text encoder of SD 1.x -------------------------------------------------------------------------------------


def text_encoder_prefix(weights: Iterable[str]) -> str:
    """`cond_stage_model.transformer.` and, in nearly every file, `text_model.` behind it."""
    nested = f"{SD1_TEXT_PREFIX}text_model."
    return nested if any(name.startswith(nested) for name in weights) else SD1_TEXT_PREFIX


def text_encoder_config(weights: Mapping[str, Tensor], prefix: str) -> CLIPTextConfig:
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


def load_text_encoder(weights: Mapping[str, Tensor], dtype: torch.dtype) -> CLIPTextModel:
    prefix = text_encoder_prefix(weights)
    with torch.device("meta"):
        text_encoder = CLIPTextModel(text_encoder_config(weights, prefix))
    fill(text_encoder, weights, lambda name: prefix + name.removeprefix("text_model."), dtype, "CLIP text encoder")
    restore_position_ids(text_encoder)
    return text_encoder


def restore_position_ids(text_encoder: CLIPTextModel) -> None:
    """`position_ids` is in no file: after a model was built on the meta device it has to be made again."""
    for module in text_encoder.modules():
        if "position_ids" in module._buffers:
            count = module._buffers["position_ids"].shape[-1]
            module._buffers["position_ids"] = torch.arange(count).unsqueeze(0)


# --- writing ---------------------------------------------------------------------------------------------------------


def ldm_state_dict(unet: UNet2DConditionModel, vae: AutoencoderKL, text_encoder: CLIPTextModel) -> dict[str, Tensor]:
    """The weights of an SD 1.x model under the names of a single-file checkpoint."""
    naming = unet_naming(unet)
    num_blocks = len(vae.config.block_out_channels)
    weights = {UNET_PREFIX + naming(name): value for name, value in unet.state_dict().items()}
    for name, value in vae.state_dict().items():
        stored = vae_name_in_file(name, num_blocks)
        is_attention_matrix = ".attn_1." in stored and value.ndim == 2
        weights[VAE_PREFIX + stored] = value[:, :, None, None] if is_attention_matrix else value
    for name, value in text_encoder.state_dict().items():
        weights[f"{SD1_TEXT_PREFIX}text_model.{name.removeprefix('text_model.')}"] = value
    return weights
