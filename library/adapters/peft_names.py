"""LoRA files as diffusers and PEFT have them: their names, and the configuration beside the tensors."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.adapters.spellings import TEXT_MODELS
from library.errors import UserError
from library.families.layer_names import LayerName
from library.network_files import read_weights
from library.safetensors_header import read_header
from library.texts import read_json

CONFIG_KEY = "lora_adapter_metadata"  # of a diffusers file's metadata; a JSON text of "MODEL.OPTION": value
ALPHA_DTYPE = "athanor.alpha_dtype"  # how a file that was converted had its alphas: torch's name, or "none"
MODELS = ("unet", "text_encoder", "text_encoder_2")
PEFT_FILE, PEFT_CONFIG, PEFT_PREFIX = "adapter_model.safetensors", "adapter_config.json", "base_model.model."
FLAT_TEXT_PARTS = ("te", "te1")  # text encoders that have no level "text_model" in transformers 5.6 and later
Config = Mapping[str, Any]  # LoraConfig's options


@dataclass(frozen=True)
class Matrices:
    """A LoRA layer as PEFT has it."""

    layer: LayerName
    down: Tensor
    up: Tensor
    magnitude: Tensor | None  # of outputs, [out]
    alpha: int | float

    @property
    def model(self) -> str:
        return TEXT_MODELS.get(self.layer.part, "unet")

    @property
    def path(self) -> str:
        """Where the layer is in the model as transformers and diffusers have it now."""
        return self.layer.path.removeprefix("text_model.") if self.layer.part in FLAT_TEXT_PARTS else self.layer.path

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        found = {f"{prefix}.lora_A.weight": self.down, f"{prefix}.lora_B.weight": self.up}
        if self.magnitude is not None:
            shape = (1, -1, 1, 1) if self.down.ndim == 4 else (-1,)
            found[f"{prefix}.lora_magnitude_vector"] = self.magnitude.reshape(shape)
        return found


def config_of(layers: Iterable[Matrices]) -> dict[str, Any]:
    """LoraConfig's options for the layers of one model: usual rank and alpha, and those that differ by module."""
    layers = list(layers)
    ranks, alphas = [len(item.down) for item in layers], [item.alpha for item in layers]
    rank, alpha = (Counter(values).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {item.path: len(item.down) for item in layers if len(item.down) != rank},
        "alpha_pattern": {item.path: item.alpha for item in layers if _differ(item.alpha, alpha)},
        "target_modules": [item.path for item in layers],
        "use_dora": any(item.magnitude is not None for item in layers),
    }


def _differ(one: float, other: float) -> bool:
    return one != other or type(one) is not type(other)


def alpha_in(config: Config | None, path: str, rank: int) -> int | float:
    """A layer's alpha by the configuration of its model; the rank where there is none."""
    if not config:
        return rank
    patterns = config.get("alpha_pattern") or {}
    ends = (pattern for pattern in patterns if path == pattern or path.endswith(f".{pattern}"))
    found = next(ends, None)
    return patterns[found] if found else config.get("lora_alpha", rank)


def read_configs(metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The configuration of each model in a diffusers file's metadata."""
    try:
        flat = read_json(metadata.get(CONFIG_KEY, "{}"))
        pairs = [(name.partition("."), value) for name, value in flat.items()]
    except (json.JSONDecodeError, AttributeError):
        raise UserError(f"the file's {CONFIG_KEY} is no JSON object") from None
    configs: dict[str, dict[str, Any]] = {}
    for (model, _, name), value in pairs:
        configs.setdefault(model, {})[name] = value
    return configs


def flat_config(configs: Mapping[str, Config]) -> str:
    return json.dumps({f"{model}.{name}": value for model, config in configs.items() for name, value in config.items()})


def read_peft_folder(folder: Path) -> tuple[dict[str, Tensor], dict[str, str], dict[str, dict[str, Any]]]:
    """Tensors under diffusers' names, metadata and configurations of a folder with PEFT's files by model."""
    weights, metadata, configs = {}, {}, {}
    for model in MODELS:
        path = folder / model / PEFT_FILE
        if not path.is_file():
            continue
        for key, value in read_weights(path).items():
            weights[f"{model}.{key.removeprefix(PEFT_PREFIX)}"] = value
        metadata |= read_header(path, "src_path").metadata
        config = path.with_name(PEFT_CONFIG)
        if config.is_file():
            configs[model] = read_json(config.read_text(encoding="utf-8"))
    if not weights:
        raise UserError(f"src_path: {folder} has no {' or '.join(f'{model}/{PEFT_FILE}' for model in MODELS)}")
    return weights, metadata, configs


def alpha_tensor(alpha: float, dtype: str | None) -> Tensor:
    """An alpha as it was in the file that was converted before; whole numbers there are whole numbers here."""
    if isinstance(alpha, int) and dtype is not None:
        return torch.tensor(alpha)
    return torch.tensor(float(alpha), dtype=getattr(torch, dtype) if dtype else torch.float32)
