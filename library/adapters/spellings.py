"""How programs write the names of layers in adapter files. Needs no torch."""

from collections.abc import Callable
from functools import cache

from library.families.layer_names import LayerName, layers_of_kind

TEXT_MODELS = {"te": "text_encoder", "te1": "text_encoder", "te2": "text_encoder_2"}  # by part, in diffusers' pipelines

Spelling = Callable[[LayerName], str | None]  # None where it has no name for the layer


def kohya(layer: LayerName) -> str:
    """kohya's, with the U-Net's layers by diffusers' paths: what it writes for SD 1.x and 2.x."""
    return f"lora_{layer.part}_{layer.path}".replace(".", "_")


def kohya_ldm(layer: LayerName) -> str:
    """kohya's, with the U-Net's layers by LDM's paths: what it writes for SDXL."""
    return f"lora_{layer.part}_{layer.ldm_path or layer.path}".replace(".", "_")


def lycoris(layer: LayerName) -> str | None:
    return f"lycoris_{layer.path}".replace(".", "_") if layer.part == "unet" else None


def diffusers(layer: LayerName) -> str:
    return f"{TEXT_MODELS.get(layer.part, layer.part)}.{layer.path}"


def bare(layer: LayerName) -> str | None:
    """diffusers' for a U-Net alone."""
    return layer.path if layer.part == "unet" else None


def processor(layer: LayerName) -> str:
    """Those of diffusers before it had PEFT."""
    return _with_processor(diffusers(layer))


def bare_processor(layer: LayerName) -> str | None:
    return _with_processor(layer.path) if layer.part == "unet" else None


def native(layer: LayerName) -> str | None:
    return f"diffusion_model.{layer.ldm_path}" if layer.part == "unet" else None


def peft(layer: LayerName) -> str | None:
    """PEFT's for a U-Net alone; its files of text encoders do not tell which one they are for."""
    return f"base_model.model.{layer.path}" if layer.part == "unet" else None


def oft(layer: LayerName) -> str | None:
    """Those of kohya's networks.oft."""
    return f"oft_unet_{layer.ldm_path}".replace(".", "_") if layer.part == "unet" else None


def oft_diffusers(layer: LayerName) -> str | None:
    return f"oft_unet_{layer.path}".replace(".", "_") if layer.part == "unet" else None


def _with_processor(path: str) -> str:
    return path.replace(".to_", ".processor.to_").removesuffix(".0" if path.endswith(".to_out.0") else "")


SPELLINGS: dict[str, Spelling] = {
    function.__name__: function
    for function in (
        *(kohya, kohya_ldm, lycoris, diffusers, bare, processor, bare_processor, native, peft, oft, oft_diffusers),
    )
}


@cache
def layers_by_name(kind: str) -> dict[str, dict[str, LayerName]]:
    """The layers of a kind of model by all names that they may have, and the spellings of each name."""
    found: dict[str, dict[str, LayerName]] = {}
    for spelling, spelled in SPELLINGS.items():
        for layer in layers_of_kind(kind):
            name = spelled(layer)
            if name is not None:
                found.setdefault(name, {})[spelling] = layer
    return found


def kohya_names(kind: str) -> dict[str, str]:
    """The names that kohya's networks write, which all programs know, by all names that layers may have."""
    spelled = kohya_ldm if kind == "sdxl" else kohya
    return {name: spelled(next(iter(found.values()))) for name, found in layers_by_name(kind).items()}
