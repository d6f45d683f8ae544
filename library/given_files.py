"""The files that flags name beside the base model and the pictures: whether they are what they are given for.

Read from their headers, without torch.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from library.dataset.picture_files import open_picture, unreadable_reason
from library.errors import UserError
from library.families import FAMILIES
from library.families.detect import CheckpointInfo, inspect_checkpoint, is_zip, read_shapes
from library.families.kinds import KINDS, Shapes, kind_of_shapes

PICKLE_START = b"\x80"  # of PyTorch files before version 1.6, which are no archives

# Layers of networks by which the base model is known: those that only one family has, and those whose inputs are as
# wide as its text encoder's outputs.
LAYERS_OF_ONE = {
    "flux": re.compile("lora_unet_(double|single)_blocks_"),
    "sd3": re.compile("lora_unet_joint_blocks_"),
    **{row.kinds[0]: re.compile(row.network_names) for row in FAMILIES.values() if row.network_names},
}
LAYERS_OF_TEXT_WIDTH = re.compile(r"(lora_unet_.*_attn2_to_k|lora_te_.*_self_attn_q_proj)\.lora_down\.weight")
KIND_OF_TEXT_WIDTH = {width: kind for row in FAMILIES.values() for kind, width in row.text_widths.items()}


def check_vae(path_text: str) -> None:
    """UserError unless --vae names a VAE, or a model that has one."""
    path = Path(path_text)
    if path.is_dir():
        if not (path / "config.json").is_file() and not (path / "vae" / "config.json").is_file():
            raise UserError(f"--vae: the folder {path} has no config.json; give a VAE's folder or file")
        return
    info = inspect_checkpoint(path_text, "--vae")
    if info.kind != "vae" and not KINDS[info.kind].has_vae:
        raise UserError(f"--vae: {info.path} is a {info.description}; wanted is a VAE, or a model that has one")


def check_thumbnail(text: str) -> None:
    """UserError unless --metadata_thumbnail is a data URL or a picture file."""
    if text.startswith("data:"):
        return
    try:
        with open_picture(Path(text)) as image:
            image.load()
    except Exception as error:  # Pillow's readers raise many kinds on damaged files
        reason = unreadable_reason(Path(text), error)
        raise UserError(f"--metadata_thumbnail: {text} is no picture that can be read ({reason})") from error


def check_network(path_text: str, flag: str, base: CheckpointInfo | None, is_ours: bool) -> Shapes | None:
    """The weights in a network file, None where only torch can tell; UserError where it is no network for the base.

    Networks of other projects (`is_ours` false) may have names that are not known here.
    """
    path = Path(path_text)
    if not path.is_file():
        raise UserError(f"{flag}: there is no file {path}")
    if path.suffix.lower() != ".safetensors" and not is_zip(path):
        with open(path, "rb") as file:
            if file.read(1) != PICKLE_START:
                raise UserError(f"{flag}: {path} is no network file, neither of safetensors nor of PyTorch")
        return None
    shapes = read_shapes(path, flag)
    kind = "adapter" if any(name.startswith(("lora_unet_", "lora_te")) for name in shapes) else kind_of_shapes(shapes)
    if kind != "adapter" and (is_ours or kind != "unknown"):
        raise UserError(f"{flag}: {path} is a {KINDS[kind].description}; wanted is a network such as a LoRA")
    kinds = base_kinds(shapes)
    if base and kinds and base.kind not in kinds:
        wanted = " or a ".join(KINDS[kind].description for kind in kinds)
        raise UserError(f"{flag}: {path} is a network for a {wanted}, but {base.path} is a {base.description}")
    return shapes


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
