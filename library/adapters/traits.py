"""What is special about the layers of an adapter file, by its header and a few numbers. Needs no torch."""

import re
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from library.adapters.keys import LayerKeys
from library.safetensors_header import SafetensorsHeader

UNPACKED = {"F32": "<f", "F64": "<d", "F16": "<e", "I64": "<q", "I32": "<i"}

# Names whose alpha diffusers looks for in vain where it is not that of most layers of the part.
ALPHA_NOT_FOUND = re.compile(r"lora_te1?_|lora_unet_.+_attn[12]_to_(q|k|v|out_0)$")


def traits_of_layers(path: Path, header: SafetensorsHeader, layers: Iterable[LayerKeys]) -> dict[str, tuple[str, ...]]:
    """For each layer of a file, by name, its keys in `consumers.TRAITS`."""
    layers = list(layers)
    alphas = read_numbers(path, header, [layer.keys["alpha"] for layer in layers if "alpha" in layer.keys])
    odd = set(_with_odd_alphas(layers, alphas))
    return {layer.name: (*_traits(layer, header, alphas), *["odd_alpha"] * (layer.name in odd)) for layer in layers}


def _with_odd_alphas(layers: Iterable[LayerKeys], alphas: Mapping[str, float]) -> Iterator[str]:
    """The names of LoRA layers with another alpha than most of their part, where that is a matter of names.

    Programs that look alphas up by module take the usual one where they find none.
    """
    parts: dict[str, dict[str, float | None]] = {}
    for layer in layers:
        if layer.algorithm == "lora" and not has_a_and_b(layer):
            part = layer.name[: layer.name.find("_", len("lora_")) + 1]
            parts.setdefault(part, {})[layer.name] = alphas.get(layer.keys.get("alpha", ""))
    for found in parts.values():
        given = [alpha for alpha in found.values() if alpha is not None]
        if given:
            usual = Counter(given).most_common(1)[0][0]
            odd = (name for name, alpha in found.items() if alpha != usual)
            yield from (name for name in odd if found[name] is None or ALPHA_NOT_FOUND.match(name))


def has_a_and_b(layer: LayerKeys) -> bool:
    """Whether a LoRA's matrices have PEFT's names."""
    return ".lora_A" in layer.keys.get("down", "")


def _traits(layer: LayerKeys, header: SafetensorsHeader, alphas: Mapping[str, float]) -> Iterator[str]:
    yield from OF_ALGORITHM.get(layer.algorithm, _plainly)(layer, header, alphas.get(layer.keys.get("alpha", "")))
    if "diff_b" in layer.keys and layer.algorithm != "bias":
        yield "bias"
    if "dora_scale" in layer.keys:
        yield _dora(layer, header.shapes[layer.keys["dora_scale"]])


def _plainly(layer: LayerKeys, header: SafetensorsHeader, alpha: float | None) -> Iterator[str]:
    yield layer.algorithm


def _lora(layer: LayerKeys, header: SafetensorsHeader, alpha: float | None) -> Iterator[str]:
    yield "lora_mid" if "mid" in layer.keys else "lora"
    if has_a_and_b(layer) and "alpha" in layer.keys:
        yield "ab_alpha_of_rank" if alpha == header.shapes[layer.keys["down"]][0] else "ab_alpha"


def _lokr(layer: LayerKeys, header: SafetensorsHeader, alpha: float | None) -> Iterator[str]:
    yield "lokr_tucker" if "lokr_t2" in layer.keys else "lokr"


def _oft(layer: LayerKeys, header: SafetensorsHeader, alpha: float | None) -> Iterator[str]:
    yield "oft_diag" if "oft_diag" in layer.keys else "oft"
    if alpha:
        yield "oft_limited"
    if "rescale" in layer.keys:
        yield "oft_rescaled"


def _ia3(layer: LayerKeys, header: SafetensorsHeader, alpha: float | None) -> Iterator[str]:
    yield "ia3_conv" if len(header.shapes[layer.keys["weight"]]) > 2 else "ia3"


def _norm(layer: LayerKeys, header: SafetensorsHeader, alpha: float | None) -> Iterator[str]:
    yield "norm" if "b_norm" in layer.keys else "norm_weight"


OF_ALGORITHM = {"lora": _lora, "lokr": _lokr, "oft": _oft, "ia3": _ia3, "norm": _norm}


def _dora(layer: LayerKeys, shape: tuple[int, ...]) -> str:
    if "lora_magnitude_vector" in layer.keys["dora_scale"]:
        return "dora_peft"
    if len(shape) > 1 and shape[0] == 1 and shape[1] != 1:
        return "dora_in"
    return "dora_out_lokr" if layer.algorithm == "lokr" else "dora_out"


def read_numbers(path: Path, header: SafetensorsHeader, keys: Iterable[str]) -> dict[str, float]:
    """The first number of each of these tensors, of those in usual formats."""
    numbers = {}
    with open(path, "rb") as file:
        for key in keys:
            file.seek(header.size + header.offsets[key][0])
            data, dtype = file.read(8).ljust(8, b"\0"), header.dtypes[key]
            if dtype == "BF16":
                (numbers[key],) = struct.unpack("<f", b"\0\0" + data[:2])
            elif dtype in UNPACKED:
                (numbers[key],) = struct.unpack_from(UNPACKED[dtype], data)
    return numbers
