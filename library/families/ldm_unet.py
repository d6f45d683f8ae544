"""The U-Net in a single-file checkpoint: its names in the LDM layout, and its configuration read off the shapes."""

import re
from collections.abc import Callable, Mapping

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from library.errors import UserError
from library.families.checkpoint_files import shape_of
from library.families.ldm_names import unet_name_in_file
from library.families.parts import Part

UNET_PREFIX = "model.diffusion_model."
SIZE_FEATURES = 256  # of each of the six numbers that tell SDXL original size, crop and target size


def eight_heads(widths: tuple[int, ...]) -> tuple[int, ...]:
    """Heads of each block's attention in SD 1.x; no shape in the file tells."""
    return (8,) * len(widths)


def heads_of_64(widths: tuple[int, ...]) -> tuple[int, ...]:
    """Heads of each block's attention in SD 2.x: 5, 10, 20, 20."""
    return tuple(max(1, width // 64) for width in widths)


def unet_config(weights: Mapping[str, Tensor], num_heads: Callable[[tuple[int, ...]], tuple[int, ...]]) -> dict:
    """The U-Net's configuration, read from the shapes in the file, with heads by the widths of its blocks."""
    names = [name.removeprefix(UNET_PREFIX) for name in weights if name.startswith(UNET_PREFIX)]

    def shape(name: str) -> tuple[int, ...]:
        return shape_of(weights, UNET_PREFIX + name)

    present = set(names)
    downsamplers = sorted(int(n.split(".")[1]) for n in names if re.fullmatch(r"input_blocks\.\d+\.0\.op\.weight", n))
    if not downsamplers:
        raise UserError("the checkpoint has no Stable Diffusion U-Net")
    layers_per_block = downsamplers[0] - 1
    num_blocks = len(downsamplers) + 1
    widths, attended, depths = [], [], []
    for block in range(num_blocks):
        first = 1 + block * (layers_per_block + 1)
        widths.append(shape(f"input_blocks.{first}.0.in_layers.2.weight")[0])
        attended.append(f"input_blocks.{first}.1.norm.weight" in present)
        pattern = rf"input_blocks\.{first}\.1\.transformer_blocks\.\d+\.norm1\.weight"
        depths.append(sum(bool(re.fullmatch(pattern, name)) for name in present) or 1)
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
        attention_head_dim=num_heads(tuple(widths)),  # what diffusers calls so is the number of heads
        use_linear_projection=len(shape(projection)) == 2,
        transformer_layers_per_block=tuple(depths),
        **(size_conditioning(shape("label_emb.0.0.weight")[1]) if "label_emb.0.0.weight" in present else {}),
    )


def size_conditioning(width: int) -> dict:
    """SDXL's added embedding of `width` features: pooled text, and six numbers of 256 features each."""
    return dict(
        addition_embed_type="text_time",
        addition_time_embed_dim=SIZE_FEATURES,
        projection_class_embeddings_input_dim=width,
    )


def unet_naming(unet: UNet2DConditionModel) -> Callable[[str], str]:
    """How this U-Net's names are spelled in an LDM file (without prefix)."""
    attended = tuple(kind.startswith("CrossAttn") for kind in unet.config.up_block_types)
    layers = unet.config.layers_per_block
    return lambda name: unet_name_in_file(name, layers, attended)


def ldm_paths(unet: UNet2DConditionModel) -> Callable[[str], str | None]:
    """How the paths of this U-Net's modules are spelled in the LDM layout; None where it has no such module."""
    naming = unet_naming(unet)

    def ldm_path(path: str) -> str | None:
        try:
            found = naming(f"{path}.weight").removesuffix(".weight")
        except ValueError:
            return None
        return found.removesuffix(".op") if re.search(r"\.downsamplers\.\d+$", path) else found

    return ldm_path


def unet_part(weights: Mapping[str, Tensor], num_heads: Callable[[tuple[int, ...]], tuple[int, ...]]) -> Part:
    config = unet_config(weights, num_heads)
    if config["in_channels"] != 4:  # seen here only of pickles, whose shapes are not known before
        raise UserError(f"the checkpoint is an inpainting model: its U-Net has {config['in_channels']} input channels")
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    naming = unet_naming(unet)
    return Part(unet, weights, lambda name: UNET_PREFIX + naming(name), "Stable Diffusion U-Net")


def unet_in_file(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """The U-Net's weights under their names in the LDM layout."""
    naming = unet_naming(unet)
    return {UNET_PREFIX + naming(name): value for name, value in unet.state_dict().items()}
