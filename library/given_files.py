"""The files that flags name beside the base model and the pictures: whether they are what they are given for.

Read from their headers, without torch.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from library.dataset.picture_files import open_picture, unreadable_reason
from library.errors import UserError, counted, quoted_list
from library.families import FAMILIES
from library.families.detect import (
    CheckpointInfo,
    inspect_checkpoint,
    is_zip,
    read_json_object,
    read_shapes,
    refuse_pointer,
)
from library.families.kinds import KINDS, Shapes, kind_of_shapes

LATENT_CHANNELS = 4
VAE_PREFIXES = ("first_stage_model.", "")  # of the names in whole checkpoints and in files of a VAE
OF_LORA = re.compile(
    r"lora_(unet|te\d?)_\w+\.(lora_(down|up)\.weight|alpha|dora_scale|diff_b|[wb]_norm)"
)  # keys of files of networks.lora
NETWORK_PREFIXES = "lora_unet_", "lora_te", "oft_unet_"
PICKLE_START = b"\x80"  # of PyTorch files before version 1.6, which are no archives

# Layers of networks by which the base model is known: those that only one family has, and those whose inputs are as
# wide as its text encoder's outputs.
LAYERS_OF_ONE = {
    "flux": re.compile("lora_unet_(double|single)_blocks_"),
    "sd3": re.compile("lora_unet_joint_blocks_"),
    **{row.kinds[0]: re.compile(row.network_names) for row in FAMILIES.values() if row.network_names},
}
LAYERS_OF_TEXT_WIDTH = re.compile(
    r"(lora_unet_.*_attn2_to_k|lora_te_.*_self_attn_q_proj)\.(lora_down\.weight|hada_w1_b)"
)
KIND_OF_TEXT_WIDTH = {width: kind for row in FAMILIES.values() for kind, width in row.text_widths.items()}


def check_vae(path_text: str, base: CheckpointInfo | None) -> None:
    """UserError unless --vae names a VAE, or a model that has one, that fits the base model."""
    path = Path(path_text)
    if path.is_dir() and not (path / "model_index.json").is_file():
        _check_vae_folder(path)
        return
    info = inspect_checkpoint(path_text, "--vae")
    scale = KINDS[info.kind].vae_scale
    if info.kind != "vae" and not scale:
        raise UserError(f"--vae: {info.path} is a {info.description}; wanted is a VAE, or a model that has one")
    if scale and base and scale != (KINDS[base.kind].vae_scale or scale):
        raise UserError(
            f"--vae: {info.path} is a {info.description}, whose VAE does not fit {base.path}, a {base.description}"
        )
    if not info.is_folder:
        _check_vae_weights(info.path, read_shapes(info.path, "--vae"))


def _check_vae_folder(path: Path) -> None:
    config_file = next((file for name in (".", "vae") if (file := path / name / "config.json").is_file()), None)
    if config_file is None:
        raise UserError(f"--vae: the folder {path} has no config.json; give a VAE's folder or file")
    config = read_json_object(config_file, "--vae")
    if (name := config.get("_class_name", "AutoencoderKL")) != "AutoencoderKL":
        raise UserError(f"--vae: the folder {path} holds a {name}; wanted is a VAE (AutoencoderKL)")
    _check_channels(path, config.get("latent_channels", LATENT_CHANNELS))


def _check_vae_weights(path: Path, shapes: Shapes) -> None:
    prefix = next((p for p in VAE_PREFIXES if f"{p}decoder.conv_in.weight" in shapes), None)
    if prefix is None:
        raise UserError(f"--vae: {path} has no VAE in it")
    if f"{prefix}encoder.mid_block.resnets.0.conv1.weight" in shapes:
        raise UserError(f"--vae: {path} has the names of diffusers; give the folder that holds its config.json instead")
    shape = shapes[f"{prefix}decoder.conv_in.weight"]
    _check_channels(path, shape[1] if shape and len(shape) > 1 else LATENT_CHANNELS)


def _check_channels(path: Path, channels: int) -> None:
    if channels != LATENT_CHANNELS:
        raise UserError(
            f"--vae: {path} makes latents of {channels} channels; those of Stable Diffusion 1.x, 2.x and XL have "
            f"{LATENT_CHANNELS}"
        )


def check_thumbnail(text: str, flag: str = "--metadata_thumbnail") -> None:
    """UserError unless the flag has a data URL or a picture file."""
    if text.startswith("data:"):
        return
    try:
        with open_picture(Path(text)) as image:
            image.load()
    except Exception as error:  # Pillow's readers raise many kinds on damaged files
        reason = unreadable_reason(Path(text), error)
        raise UserError(f"{flag}: {text} is no picture that can be read ({reason})") from error


def check_network(path_text: str, flag: str, base: CheckpointInfo | None, is_ours: bool) -> Shapes | None:
    """The weights in a network file, None where only torch can tell; UserError where it is no network for the base.

    Networks of other projects (`is_ours` false) may have names that are not known here.
    """
    path = Path(path_text)
    if not path.is_file():
        raise UserError(f"{flag}: there is no file {path}")
    refuse_pointer(path, flag)
    if path.suffix.lower() != ".safetensors" and not is_zip(path):
        with open(path, "rb") as file:
            if file.read(1) != PICKLE_START:
                raise UserError(f"{flag}: {path} is no network file, neither of safetensors nor of PyTorch")
        return None
    shapes = read_shapes(path, flag)
    kind = "adapter" if any(name.startswith(NETWORK_PREFIXES) for name in shapes) else kind_of_shapes(shapes)
    if kind != "adapter" and (is_ours or kind != "unknown"):
        raise UserError(f"{flag}: {path} is a {KINDS[kind].description}; wanted is a network such as a LoRA")
    kinds = base_kinds(shapes)
    if base and kinds and base.kind not in kinds:
        wanted = " or a ".join(KINDS[kind].description for kind in kinds)
        raise UserError(f"{flag}: {path} is a network for a {wanted}, but {base.path} is a {base.description}")
    return shapes


def check_lora_keys(path_text: str, flag: str, shapes: Shapes) -> None:
    """UserError for weights that no LoRA of kohya's has; what a pickle's names are of is not known."""
    other = [name for name in shapes if not OF_LORA.fullmatch(name)]
    if other and None not in shapes.values():
        raise UserError(
            f"{flag}: {path_text} is no LoRA as networks.lora has it: {counted(len(other), 'weight')} of another "
            f"algorithm or program, {quoted_list(other, 3)}"
        )


def base_kinds(shapes: Shapes) -> tuple[str, ...]:
    """The kinds of base model (keys of `KINDS`) that a network can be for; none where its names do not tell."""
    for kind, layers in LAYERS_OF_ONE.items():
        if any(layers.match(name) for name in shapes):
            return (kind,)
    for width in widths_of_text(shapes):
        if width in KIND_OF_TEXT_WIDTH:
            return (KIND_OF_TEXT_WIDTH[width],)
    return ("sd1", "sd2") if any(name.startswith("lora_te_") for name in shapes) else ()


def widths_of_text(shapes: Shapes) -> Iterable[int]:
    return (
        shape[1] for name, shape in shapes.items() if shape and len(shape) > 1 and LAYERS_OF_TEXT_WIDTH.fullmatch(name)
    )
