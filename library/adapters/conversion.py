"""Adapter files under the names of other programs; their tensors stay what they are, bit for bit."""

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from library.adapters import peft_names, spellings
from library.adapters.file_kind import KIND_NAMES, kind_of_file
from library.adapters.keys import LayerKeys, sort_keys
from library.adapters.peft_names import ALPHA_DTYPE, CONFIG_KEY, Matrices
from library.adapters.spellings import Spelling, layers_by_name
from library.adapters.traits import has_a_and_b
from library.errors import UserError, counted, quoted_list
from library.families.layer_names import LayerName
from library.files import put_folder_in_place, temporary_folder, write_bytes_whole, write_text_whole
from library.network_files import read_weights, write_weights
from library.safetensors_header import read_header

logger = logging.getLogger(__name__)

Weights = dict[str, Tensor]


@dataclass
class Source:
    """An adapter file that was read."""

    path: Path
    kind: str
    layers: list[tuple[LayerName, LayerKeys]]
    weights: Weights
    metadata: dict[str, str]
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)  # of diffusers and PEFT, by model

    def tensor(self, layer: LayerKeys, part: str) -> Tensor | None:
        return self.weights[layer.keys[part]] if part in layer.keys else None

    def alpha(self, name: LayerName, layer: LayerKeys) -> float:
        """As a number that says whether it was a whole one in the file."""
        if (found := self.tensor(layer, "alpha")) is not None:
            return found.flatten()[0].item()
        rank = len(self.tensor(layer, "down"))
        config = self.configs.get(spellings.TEXT_MODELS.get(name.part, "unet"))
        return peft_names.alpha_in(config, name.path, rank)


def convert(source: Path, target: Path, to: str) -> None:
    """Write the file under the names of `to`, a key of TARGETS; UserError for what they cannot say."""
    opened = open_source(source)
    TARGETS[to](opened, target)
    logger.info("wrote %s: %s of %s", target, counted(len(opened.layers), "layer"), KIND_NAMES[opened.kind])


def open_source(path: Path) -> Source:
    """Read an adapter file, or a folder of PEFT's."""
    metadata: dict[str, str] = {}
    if path.is_dir():
        weights, metadata, configs = peft_names.read_peft_folder(path)
    else:
        weights = read_weights(path)
        if path.suffix.lower() == ".safetensors":
            metadata = read_header(path, "src_path").metadata
        configs = peft_names.read_configs(metadata)
    weights = {_with_text_model(key): value for key, value in weights.items()}
    found = sort_keys(weights)
    shapes = {key: tuple(value.shape) for key, value in weights.items()}
    kind = kind_of_file(found.layers, shapes, metadata, path)
    known = layers_by_name(kind)
    unknown = [*found.leftovers, *(name for name in found.layers if name not in known)]
    if unknown:
        raise UserError(f"src_path: {path} has what no model of {KIND_NAMES[kind]} has: {quoted_list(unknown, 3)}")
    layers = [(next(iter(known[name].values())), layer) for name, layer in found.layers.items()]
    return Source(path, kind, layers, weights, metadata, configs)


def _with_text_model(key: str) -> str:
    """A key with the level that transformers 5.6 dropped, and files have."""
    for model in ("text_encoder.", "text_encoder_2."):
        if key.startswith((f"{model}encoder.", f"{model}final_layer_norm.")):
            return f"{model}text_model.{key.removeprefix(model)}"
    return key


def _to_kohya(spelling_of_sdxl: Spelling, source: Source, target: Path) -> None:
    spelled = spelling_of_sdxl if source.kind == "sdxl" else spellings.kohya
    weights: Weights = {}
    for name, layer in source.layers:
        is_theirs = has_a_and_b(layer) or "lora_magnitude_vector" in layer.keys.get("dora_scale", "")
        taken = _as_kohyas(source, name, layer) if is_theirs else _renamed(source, layer)
        weights |= {f"{spelled(name)}.{end}": value for end, value in taken.items()}
    metadata = {name: value for name, value in source.metadata.items() if name not in (CONFIG_KEY, ALPHA_DTYPE)}
    write_weights(target, weights, None, metadata)


def _renamed(source: Source, layer: LayerKeys) -> Weights:
    ends = {"down": "lora_down.weight", "up": "lora_up.weight", "mid": "lora_mid.weight"}
    ends |= {name: f"{name}.weight" for name in ("a1", "a2", "b1", "b2")}
    return {ends.get(part, part): source.weights[key] for part, key in layer.keys.items()}


def _as_kohyas(source: Source, name: LayerName, layer: LayerKeys) -> Weights:
    down, up = (source.tensor(layer, part) for part in ("down", "up"))
    weights: Weights = {}
    dtype = source.metadata.get(ALPHA_DTYPE)
    if "alpha" in layer.keys:
        weights["alpha"] = source.tensor(layer, "alpha")
    elif dtype != "none":
        weights["alpha"] = peft_names.alpha_tensor(source.alpha(name, layer), dtype)
    weights |= {"lora_down.weight": down, "lora_up.weight": up}
    if (magnitude := source.tensor(layer, "dora_scale")) is not None:
        weights["dora_scale"] = magnitude.reshape(-1, *[1] * (down.ndim - 1))
    return weights


def _matrices(source: Source) -> list[Matrices]:
    """The layers as PEFT has them; UserError for those that it cannot have."""
    problems: dict[str, list[str]] = {}
    found = []
    for name, layer in source.layers:
        if reason := _why_not_peft(source, layer):
            problems.setdefault(reason, []).append(layer.name)
            continue
        magnitude = source.tensor(layer, "dora_scale")
        down, up = source.tensor(layer, "down"), source.tensor(layer, "up")
        found.append(Matrices(name, down, up, magnitude, source.alpha(name, layer)))
    if problems:
        raise UserError(*(_cannot(source, reason, names) for reason, names in problems.items()))
    return found


def _cannot(source: Source, reason: str, names: list[str]) -> str:
    return (
        f"src_path: {source.path} has {counted(len(names), 'layer')} with {reason}, which diffusers and PEFT have no "
        f"names for, e.g. {names[0]}; networks/verify_lora.py --bake makes a plain LoRA of it"
    )


def _why_not_peft(source: Source, layer: LayerKeys) -> str | None:
    if layer.algorithm != "lora":
        return layer.algorithm
    if "mid" in layer.keys or "diff_b" in layer.keys:
        return "lora_mid" if "mid" in layer.keys else "a change of bias"
    magnitude = source.tensor(layer, "dora_scale")
    num_outputs = len(source.tensor(layer, "up"))
    if magnitude is not None and not has_a_and_b(layer) and magnitude.ndim > 1 and len(magnitude) != num_outputs:
        return "DoRA with norms of inputs"
    return None


def _metadata(source: Source) -> dict[str, str]:
    """The file's, with how it had its alphas."""
    alphas = [source.weights[layer.keys["alpha"]] for _, layer in source.layers if "alpha" in layer.keys]
    floats = {str(alpha.dtype).removeprefix("torch.") for alpha in alphas if alpha.is_floating_point()}
    kept = {name: value for name, value in source.metadata.items() if name != CONFIG_KEY}
    if source.configs and not alphas:  # they are in the configurations, and kept is how they were before
        return kept
    return kept | {ALPHA_DTYPE: (floats.pop() if len(floats) == 1 else "float32") if alphas else "none"}


def _by_model(layers: Iterable[Matrices]) -> dict[str, list[Matrices]]:
    found: dict[str, list[Matrices]] = {}
    for item in layers:
        found.setdefault(item.model, []).append(item)
    return found


def _to_diffusers(source: Source, target: Path) -> None:
    layers = _matrices(source)
    weights: Weights = {}
    for item in layers:
        weights |= item.tensors(spellings.diffusers(item.layer))
    configs = {model: peft_names.config_of(items) for model, items in _by_model(layers).items()}
    write_weights(target, weights, None, _metadata(source) | {CONFIG_KEY: peft_names.flat_config(configs)})


def _to_peft(source: Source, target: Path) -> None:
    with temporary_folder(target) as folder:
        for model, items in _by_model(_matrices(source)).items():
            _write_peft(folder / model, items, _metadata(source))
        put_folder_in_place(folder, target)


def _write_peft(folder: Path, layers: Iterable[Matrices], metadata: Mapping[str, str]) -> None:
    weights: Weights = {}
    for item in layers:
        weights |= item.tensors(f"{peft_names.PEFT_PREFIX}{item.path}")
    contiguous = {key: value.contiguous() for key, value in weights.items()}
    write_bytes_whole(folder / peft_names.PEFT_FILE, save(contiguous, dict(metadata) or None))
    config = {"peft_type": "LORA", "inference_mode": True} | peft_names.config_of(layers)
    write_text_whole(folder / peft_names.PEFT_CONFIG, json.dumps(config, indent=2))


def _to_kohyas_own(source: Source, target: Path) -> None:
    _to_kohya(spellings.kohya_ldm, source, target)


def _to_kohya_diffusers(source: Source, target: Path) -> None:
    _to_kohya(spellings.kohya, source, target)


TARGETS = {
    "kohya": _to_kohyas_own,
    "kohya_diffusers": _to_kohya_diffusers,
    "diffusers": _to_diffusers,
    "peft": _to_peft,
}
