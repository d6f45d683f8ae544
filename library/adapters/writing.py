"""What files say of themselves that tools made: kohya's short metadata, the modelspec, and how they are written."""

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path

import torch

from library.adapters.combining import PlainLora
from library.adapters.file import AdapterFile
from library.network_files import write_weights
from library.safetensors_header import read_header
from library.training.metadata import IMPLEMENTATION_VERSION

DTYPES = {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # as --save_precision names them
DYNAMIC = "Dynamic"  # ss_network_dim and ss_network_alpha where layers differ
ARCHITECTURES = {  # by ss_base_model_version: modelspec.architecture, usual resolution, what the model predicts
    "sd_v1": ("stable-diffusion-v1", "512x512", "epsilon"),
    "sd_v1_v": ("stable-diffusion-v1", "512x512", "v"),
    "sd_v2": ("stable-diffusion-v2-512", "512x512", "epsilon"),
    "sd_v2_v": ("stable-diffusion-v2-768-v", "768x768", "v"),
    "sdxl_base_v1-0": ("stable-diffusion-xl-v1-base", "1024x1024", "epsilon"),
}
VERSIONS = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}  # by kind of checkpoint
GENERATIVE_MODELS = "https://github.com/Stability-AI/generative-models"


def short_metadata(
    version: str | None, lora: PlainLora, network_args: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The ss_ fields that say what a LoRA fits, as kohya's tools write them."""
    fields = {
        "ss_v2": str(version is not None and version.startswith("sd_v2")),
        "ss_base_model_version": version,
        "ss_network_module": "networks.lora",
        "ss_network_dim": one_or_dynamic(lora.ranks.values()),
        "ss_network_alpha": one_or_dynamic(lora.alphas.values()),
        "ss_network_args": None if network_args is None else json.dumps(dict(network_args)),
    }
    return {name: value for name, value in fields.items() if value is not None}


def one_or_dynamic(values: Iterable[float]) -> str:
    found = set(values)
    return str(found.pop()) if len(found) == 1 else DYNAMIC


def version_of(files: Sequence[AdapterFile]) -> str | None:
    """The base model's version as the first file that tells it says."""
    return next((found for file in files if (found := file.metadata.get("ss_base_model_version"))), None)


def modelspec(version: str | None, target: Path, sources: Sequence[Path], is_lora: bool) -> dict[str, str]:
    """The modelspec of a file made of others, which it names; a checkpoint goes on from that of the first."""
    spec = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.implementation_version": IMPLEMENTATION_VERSION,
        "modelspec.title": target.stem,
        "modelspec.date": datetime.now().isoformat(timespec="seconds"),
        "modelspec.merged_from": ", ".join(map(title_of, sources)),
    }
    if version not in ARCHITECTURES:
        return spec
    architecture, resolution, prediction = ARCHITECTURES[version]
    in_diffusers = is_lora and not version.startswith("sdxl")
    guessed = {
        "modelspec.architecture": architecture + ("/lora" if is_lora else ""),
        "modelspec.implementation": "diffusers" if in_diffusers else GENERATIVE_MODELS,
        "modelspec.prediction_type": prediction,
        "modelspec.resolution": resolution,
    }
    return guessed | ({} if is_lora else own_modelspec(sources[0])) | spec


def title_of(path: Path) -> str:
    """What a file calls itself, or its name."""
    return own_modelspec(path).get("modelspec.title") or path.stem


def own_modelspec(path: Path) -> dict[str, str]:
    """What a file says of itself, which goes before what its weights let guess."""
    if path.is_dir() or path.suffix.lower() != ".safetensors":
        return {}
    metadata = read_header(path, str(path)).metadata
    return {name: value for name, value in metadata.items() if name.startswith("modelspec.")}


def write_lora(path: Path, lora: PlainLora, precision: str | None, metadata: Mapping[str, str]) -> None:
    """Write the file, in float32 unless another number format is named."""
    write_weights(path, lora.weights, DTYPES[precision or "float"], dict(metadata))
