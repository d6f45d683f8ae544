"""What the programs that load adapter files do with them, as data. Needs no torch.

Found by running the loaders of ComfyUI 0.14.1, AUTOMATIC1111's WebUI 1.10.1 and diffusers 0.42.1 (with transformers
5.23) on files of each kind, and comparing the weights that they apply with those of the program that trained the file:
relative errors of the change of weight, on the CPU in float32, of Linear layers and 3x3 convolutions, where the change
is anything from a hundredth of the weight to as large. Of Forge (dfdcbab) the code was read, which is that of an older
ComfyUI; where its numbers were not measured, it says so.
"""

from dataclasses import dataclass, field
from typing import Literal

Verdict = Literal["exact", "not measured", "wrong", "not applied", "refused"]
VERDICTS: tuple[Verdict, ...] = ("exact", "not measured", "wrong", "not applied", "refused")  # from good to bad


@dataclass(frozen=True)
class Outcome:
    """What a program makes of a layer; refused is the whole file because of it."""

    verdict: Verdict
    why: str = ""
    error: str = ""  # of the change of weight, relative, where it is wrong


EXACT = Outcome("exact")
NOT_MEASURED = Outcome("not measured")
UNKNOWN_KEYS = Outcome("refused", "a key that it does not know is an error")
UNKNOWN_NAME = Outcome("not applied", "it does not know them")
UNKNOWN_NAME_IS_AN_ERROR = Outcome("refused", "a name that it does not know is an error")
NO_OFT = Outcome("not applied", "it has no OFT")


@dataclass(frozen=True)
class Consumer:
    """A program, and which names of layers it knows: keys of `library.adapters.spellings.SPELLINGS`."""

    version: str
    names: tuple[str, ...]
    names_of_kind: dict[str, tuple[str, ...]] = field(default_factory=dict)  # more of them, by kind of model
    names_of_ab: tuple[str, ...] | None = None  # those of layers with lora_A and lora_B, where they are others
    missing: dict[str, tuple[str, ...]] = field(default_factory=dict)  # paths it misses under kohya's names, by kind
    has_text_norms: bool = True
    refuses_unknown: bool = False  # the whole file for one key that it does not know
    max_unknown: int | None = None  # and for more keys than these


CONSUMERS = {
    "ComfyUI": Consumer(
        "0.14.1",
        names=("kohya", "kohya_ldm", "lycoris", "processor", "bare_processor", "native"),
        has_text_norms=False,
    ),
    "WebUI": Consumer(
        "1.10.1",
        names=("kohya", "kohya_ldm"),
        names_of_kind={"sdxl": ("oft",)},
        missing={"sdxl": ("up_blocks.0.upsamplers.0.conv",)},  # it takes SDXL's blocks for those of SD 1.x there
    ),
    "Forge": Consumer(
        "dfdcbab",
        names=("kohya", "kohya_ldm", "processor", "bare_processor", "native"),
        has_text_norms=False,
        max_unknown=12,
    ),
    "diffusers": Consumer(
        "0.42.1",
        names=("kohya",),
        names_of_kind={"sdxl": ("kohya_ldm",)},
        names_of_ab=("diffusers",),
        refuses_unknown=True,
    ),
}


@dataclass(frozen=True)
class Trait:
    """Something that a layer of a file may have, and what comes of it by program."""

    label: str
    outcomes: dict[str, Outcome]


def _trait(label: str, comfyui: Outcome, webui: Outcome, forge: Outcome, diffusers: Outcome = UNKNOWN_KEYS) -> Trait:
    return Trait(label, {"ComfyUI": comfyui, "WebUI": webui, "Forge": forge, "diffusers": diffusers})


NORM_OF_W = "it divides by the norm of the weight without its change"
COLUMNS = "it always takes the norms over the inputs, and so changes the weight itself"
DORA_DROPPED = Outcome("wrong", "it leaves the learned norms out", "0.9 to 4.6")
AB_ALPHA = "it does not read alpha beside lora_A and lora_B, so that the change is rank / alpha times as large"

TRAITS = {
    "lora": _trait("LoRA", EXACT, EXACT, EXACT, EXACT),
    "ab_alpha_of_rank": _trait("lora_A and lora_B with alpha", EXACT, EXACT, EXACT),
    "ab_alpha": _trait("lora_A and lora_B with alpha", EXACT, Outcome("wrong", AB_ALPHA), EXACT),
    "odd_alpha": _trait(
        "LoRA with another alpha than the layers beside it",
        EXACT,
        EXACT,
        EXACT,
        Outcome("wrong", "it gives attention, CLIP-L and layers without alpha the alpha that most layers have"),
    ),
    "lora_mid": _trait("LoCon with lora_mid", EXACT, EXACT, NOT_MEASURED),
    "loha": _trait("LoHa", EXACT, EXACT, NOT_MEASURED),
    "lokr": _trait("LoKr", EXACT, EXACT, NOT_MEASURED),
    "lokr_tucker": _trait(
        "LoKr in Tucker form", Outcome("not applied", "it fails to shape the product"), EXACT, NOT_MEASURED
    ),
    "oft": _trait("OFT", EXACT, EXACT, NO_OFT),
    "oft_limited": _trait("OFT with a constraint", Outcome("wrong", "", "0.98"), EXACT, NO_OFT),
    "oft_rescaled": _trait("OFT with rescale", Outcome("wrong", "rescale is left out", "0.10"), EXACT, NO_OFT),
    "oft_diag": _trait("OFT of the first LyCORIS or kohya", NO_OFT, NOT_MEASURED, NO_OFT),
    "glora": _trait("GLoRA", EXACT, Outcome("not applied", "it stops with an exception"), NOT_MEASURED),
    "ia3": _trait(
        "(IA)^3", Outcome("not applied", "it has no (IA)^3"), EXACT, Outcome("not applied", "it has no (IA)^3")
    ),
    "ia3_conv": _trait(
        "(IA)^3 of a convolution",
        Outcome("not applied", "it has no (IA)^3"),
        Outcome("not applied", "it stops with an exception"),
        Outcome("not applied", "it has no (IA)^3"),
    ),
    "full": _trait("a full change of weight", NOT_MEASURED, NOT_MEASURED, NOT_MEASURED),
    "bias": _trait("a change of bias", NOT_MEASURED, NOT_MEASURED, NOT_MEASURED),
    "norm": _trait("a change of a norm's weight and bias", NOT_MEASURED, NOT_MEASURED, NOT_MEASURED),
    "norm_weight": _trait(
        "a change of a norm's weight alone",
        NOT_MEASURED,
        Outcome("refused", "it wants w_norm and b_norm together"),
        NOT_MEASURED,
    ),
    "dora_in": _trait("DoRA with norms of inputs", EXACT, EXACT, NOT_MEASURED, DORA_DROPPED),
    "dora_out": _trait(
        "DoRA with norms of outputs",
        Outcome("wrong", NORM_OF_W, "0.04 to 0.6"),
        Outcome("wrong", COLUMNS, "0.2 to 5"),
        NOT_MEASURED,
        DORA_DROPPED,
    ),
    "dora_out_lokr": _trait(
        "LoKr with DoRA, norms of outputs",
        Outcome("wrong", NORM_OF_W, "0.10 to 0.15"),
        Outcome("wrong", COLUMNS, "0.27 to 0.98"),
        NOT_MEASURED,
    ),
    "dora_peft": _trait(
        "DoRA as PEFT writes it",
        Outcome("not applied", "it does not know lora_magnitude_vector"),
        Outcome("not applied", "it does not know lora_magnitude_vector"),
        Outcome("not applied", "it does not know lora_magnitude_vector"),
        EXACT,
    ),
    "alpha_alone": _trait(
        "an alpha without weights",
        Outcome("not applied"),
        Outcome("refused", "a layer with an alpha alone is an error"),
        Outcome("not applied"),
    ),
    "unknown": _trait(
        "keys that are no adapter's",
        Outcome("not applied"),
        Outcome("refused", "a layer with unknown keys alone is an error"),
        Outcome("not applied"),
    ),
}

# What the WebUI's list of LoRAs takes a file for, by the beginning of ss_base_model_version; else ss_v2 decides. It
# hides those that are not for the model that is loaded.
WEBUI_SDXL_VERSION = "sdxl_"
KINDS_IN_WEBUI = {"sd1": "SD1", "sd2": "SD2", "sdxl": "SDXL"}
FORGE_ARCHITECTURES = {"sd1": "stable-diffusion-v1", "sd2": "stable-diffusion-v2", "sdxl": "stable-diffusion-xl"}
JSON_OBJECTS = ("ss_tag_frequency", "ss_bucket_info", "ss_dataset_dirs")  # which are read only if they begin with {
