"""What a checkpoint is, read from its header alone: no torch, no weights, no code of a pickle run."""

import os
import pickletools
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

from library.errors import UserError, first_line
from library.texts import read_json

WEIGHT_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
MAX_PICKLE_BYTES = 20_000_000  # of the index of a torch file; large models have about 1 MB
SD2_TEXT_LAYERS = 23  # of the 24 in its files: it was trained with the output of the last but one


@dataclass(frozen=True)
class CheckpointInfo:
    """Where a base model lies and which kind it is."""

    path: Path
    kind: str  # a key of KINDS
    is_folder: bool

    @property
    def description(self) -> str:
        return KINDS[self.kind]


KINDS = {
    "sd1": "Stable Diffusion 1.x model",
    "sd1_inpainting": "Stable Diffusion 1.x inpainting model",
    "sd2": "Stable Diffusion 2.x model",
    "sd2_inpainting": "Stable Diffusion 2.x inpainting, depth or upscaling model",
    "sdxl": "Stable Diffusion XL base model",
    "sdxl_refiner": "Stable Diffusion XL refiner",
    "sd3": "Stable Diffusion 3 model",
    "flux": "FLUX model",
    "lumina2": "Lumina Image 2 or Z-Image model",
    "pixart": "PixArt model",
    "unet_only": "U-Net without text encoder",
    "vae": "VAE, not a whole model",
    "adapter": "LoRA or similar adapter, not a base model",
    "embedding": "textual-inversion embedding, not a base model",
    "text_encoder": "text encoder, not a whole model",
    "unknown": "file whose weights have names that no Stable Diffusion model has",
}

PIPELINE_KINDS = {
    "StableDiffusionPipeline": "sd1",
    "StableDiffusionImg2ImgPipeline": "sd1",
    "StableDiffusionInpaintPipeline": "sd1_inpainting",
    "StableDiffusionDepth2ImgPipeline": "sd2_inpainting",
    "StableDiffusionUpscalePipeline": "sd2_inpainting",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusionXLImg2ImgPipeline": "sdxl_refiner",
    "StableDiffusion3Pipeline": "sd3",
    "FluxPipeline": "flux",
    "Lumina2Pipeline": "lumina2",
    "ZImagePipeline": "lumina2",
    "PixArtAlphaPipeline": "pixart",
    "PixArtSigmaPipeline": "pixart",
}


def inspect_checkpoint(path_text: str, flag: str = "--pretrained_model_name_or_path") -> CheckpointInfo:
    """The kind of the base model at the path; UserError where there is none."""
    path = Path(path_text)
    if os.path.isdir(path):
        return CheckpointInfo(path, _kind_of_folder(path, flag), is_folder=True)
    if not os.path.isfile(path):
        raise UserError(_missing_sentence(path_text, flag))
    if path.suffix.lower() not in WEIGHT_SUFFIXES:
        raise UserError(
            f"{flag}: {path} is not a checkpoint; give a .safetensors or .ckpt file or a diffusers model folder"
        )
    return CheckpointInfo(path, kind_of_shapes(read_shapes(path, flag)), is_folder=False)


def require_kind(
    info: CheckpointInfo, accepted: tuple[str, ...], flag: str = "--pretrained_model_name_or_path"
) -> None:
    """UserError unless the checkpoint is of a kind that this script trains."""
    if info.kind not in accepted:
        wanted = " or ".join(KINDS[kind] for kind in accepted)
        raise UserError(f"{flag}: {info.path} is a {info.description}; wanted is a {wanted}")


def read_shapes(path: Path, flag: str) -> dict[str, tuple[int, ...] | None]:
    """Weight names and shapes of a checkpoint file (shape None where a pickle does not tell)."""
    if path.suffix.lower() == ".safetensors":
        return _shapes_of_safetensors(path, flag)
    return dict.fromkeys(_names_in_pickle(path, flag))


def _missing_sentence(path_text: str, flag: str) -> str:
    path = Path(path_text)
    if re.fullmatch(r"\w[\w.-]*/[\w.-]+", path_text) and path.suffix.lower() not in WEIGHT_SUFFIXES:
        return (
            f"{flag}: there is no folder {path_text} here; nothing is downloaded, so if this is a name on the "
            "Hugging Face hub, download the model first and give the path of its folder or .safetensors file"
        )
    if not path.parent.is_dir():
        return f"{flag}: {path_text} does not exist (there is no folder {path.parent}); give the path of a checkpoint"
    neighbours = sorted(p.name for p in path.parent.iterdir() if p.suffix.lower() in WEIGHT_SUFFIXES)[:5]
    found = f"; {path.parent} has {', '.join(neighbours)}" if neighbours else ""
    return f"{flag}: the file {path_text} does not exist{found}"


def _kind_of_folder(path: Path, flag: str) -> str:
    index_path = path / "model_index.json"
    if not index_path.is_file():
        raise UserError(f"{flag}: the folder {path} is not a diffusers model: it has no model_index.json")
    index = _read_json(index_path, flag)
    kind = PIPELINE_KINDS.get(str(index.get("_class_name")), "unknown")
    if kind not in ("sd1", "sd1_inpainting"):
        return kind
    unet, text_encoder = (_read_json_if_there(path / part / "config.json", flag) for part in ("unet", "text_encoder"))
    has_open_clip = unet.get("cross_attention_dim") == 1024 or text_encoder.get("hidden_act") == "gelu"
    takes_more = kind == "sd1_inpainting" or unet.get("in_channels", 4) != 4
    return ("sd2" if has_open_clip else "sd1") + ("_inpainting" if takes_more else "")


def _read_json_if_there(path: Path, flag: str) -> dict:
    return _read_json(path, flag) if path.is_file() else {}


def _read_json(path: Path, flag: str) -> dict:
    try:
        return dict(read_json(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise UserError(f"{flag}: {path} is broken; get the model again") from None


def _shapes_of_safetensors(path: Path, flag: str) -> dict[str, tuple[int, ...] | None]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        if size < 8 or header_size > min(size - 8, MAX_HEADER_BYTES):
            raise UserError(f"{flag}: {path} is not a safetensors file or was cut off ({size} bytes); get it again")
        try:
            header = read_json(file.read(header_size).decode())
            header.pop("__metadata__", None)
            shapes = {name: _sizes(entry["shape"]) for name, entry in header.items()}
            ends = [_sizes(entry["data_offsets"])[1] for entry in header.values()]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise UserError(f"{flag}: {path} has a broken safetensors header; get the file again") from None
    expected = 8 + header_size + max(ends, default=0)
    if size < expected:
        raise UserError(
            f"{flag}: {path} is cut off: its header promises {expected} bytes, it has {size}; get the file again"
        )
    return shapes


def _sizes(values: list[int]) -> tuple[int, ...]:
    """A shape, or two ends of data; ValueError where it is none."""
    if not all(type(value) is int and value >= 0 for value in values):
        raise ValueError(f"{values} are no sizes")
    return tuple(values)


def is_zip(path: Path) -> bool:
    """Whether a file ends as a zip archive does."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # an archive in several parts
        return False


def _names_in_pickle(path: Path, flag: str) -> list[str]:
    """The strings of a torch pickle's index; the pickle is only scanned, never run."""
    if not is_zip(path):
        raise UserError(
            f"{flag}: {path} is not a checkpoint that can be read safely (no torch zip archive, or cut off); "
            "get the .safetensors version of this model"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            index = [item for item in archive.infolist() if item.filename.endswith("data.pkl")]
            num_bytes = sum(item.file_size for item in archive.infolist())
            if index and index[0].file_size <= MAX_PICKLE_BYTES and num_bytes <= path.stat().st_size:
                operations = pickletools.genops(archive.read(index[0]))
                return [argument for _, argument, _ in operations if isinstance(argument, str)]
    except Exception as error:  # zipfile and pickletools raise many kinds on damaged files
        raise UserError(f"{flag}: {path} is broken ({first_line(error)}); get the file again") from None
    raise UserError(f"{flag}: {path} is a zip archive but no torch checkpoint, which torch would not have compressed")


def kind_of_shapes(shapes: dict[str, tuple[int, ...] | None]) -> str:
    """The kind of model that weights of these names and shapes are (shapes may be None)."""

    def has(*fragments: str) -> bool:
        return any(all(fragment in name for fragment in fragments) for name in shapes)

    if has(".lora_down.") or has(".lora_A.") or has("hada_w1") or has("lokr_w1") or has("oft_blocks"):
        return "adapter"
    if has("joint_blocks.0."):
        return "sd3"
    if has("double_blocks.0."):
        return "flux"
    if has("context_refiner.0."):
        return "lumina2"
    if has("scale_shift_table"):
        return "pixart"
    if has("model.diffusion_model.input_blocks."):
        return _kind_of_ldm_unet(shapes, has)
    if has("decoder.conv_in.") and has("encoder.conv_in."):
        return "vae"
    if has("emb_params") or has("string_to_param"):
        return "embedding"
    if has("embeddings.token_embedding") or has("encoder.embed_tokens") or has("shared.weight"):
        return "text_encoder"
    if has("down_blocks.0.") or has("input_blocks.0."):
        return "unet_only"
    return "unknown"


def _kind_of_ldm_unet(shapes: dict[str, tuple[int, ...] | None], has) -> str:
    first_convolution = shapes.get("model.diffusion_model.input_blocks.0.0.weight")
    if has("conditioner.embedders.1."):
        return "sdxl"
    if has("conditioner.embedders.0."):
        return "sdxl_refiner"
    takes_more = first_convolution and first_convolution[1:2] != (4,)
    if has("cond_stage_model.model."):
        return "sd2_inpainting" if takes_more else "sd2"
    if not has("cond_stage_model.transformer."):
        return "unet_only"
    return "sd1_inpainting" if takes_more else "sd1"
