"""Which kind of model an adapter file is for, by its header. Needs no torch."""

from collections.abc import Mapping
from pathlib import Path

from library.adapters.consumers import WEBUI_SDXL_VERSION
from library.adapters.keys import LayerKeys
from library.adapters.spellings import layers_by_name
from library.errors import UserError, quoted_list
from library.families.layer_names import ARCHITECTURES

Shapes = Mapping[str, tuple[int, ...]]

KIND_NAMES = {"sd1": "SD 1.x", "sd2": "SD 2.x", "sdxl": "SDXL"}
WIDTHS = {768: "sd1", 1024: "sd2", 2048: "sdxl"}  # of the texts that cross-attention reads
CROSS_ATTENTION = ("attn2_to_k", "attn2.to_k")


def kind_of_file(layers: Mapping[str, LayerKeys], shapes: Shapes, metadata: Mapping[str, str], path: Path) -> str:
    """The kind of model whose layers these are; where names fit several, widths decide, then metadata."""
    fits = {kind: sum(name in layers_by_name(kind) for name in layers) for kind in ARCHITECTURES}
    best = [kind for kind, count in fits.items() if count == max(fits.values())]
    if not max(fits.values()):
        version = metadata.get("ss_base_model_version") or metadata.get("modelspec.architecture")
        told = f" (it says that it is for {version})" if version else ""
        names = quoted_list(list(layers or shapes), 2)
        raise UserError(f"{path} has no layers of SD 1.x, 2.x or SDXL{told}, but {names}")
    widths = [
        WIDTHS.get(shapes[layer.keys["down"]][-1])
        for name, layer in layers.items()
        if "down" in layer.keys and name.endswith(CROSS_ATTENTION)
    ]
    return next((kind for kind in (*widths, kind_in_metadata(metadata)) if kind in best), best[0])


def kind_in_metadata(metadata: Mapping[str, str]) -> str | None:
    """The kind of model that the WebUI's list takes a file to be for; None where it cannot tell."""
    if metadata.get("ss_base_model_version", "").startswith(WEBUI_SDXL_VERSION):
        return "sdxl"
    if not metadata:
        return None
    return "sd2" if metadata.get("ss_v2") == "True" else "sd1"
