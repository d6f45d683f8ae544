"""What is known of pictures before a model is loaded: the model's kind, the networks, all prompts. Needs no torch."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from library.adapters.keys import sort_keys
from library.dataset.picture_files import open_picture, unreadable_reason
from library.errors import UserError, quoted_list
from library.families import FAMILIES, FamilyRow, family_of_kind
from library.families.agreement import check_clip_skip, folder_predicts_v
from library.families.detect import CheckpointInfo, inspect_checkpoint
from library.folders import check_writable
from library.generating.options import DrawOptions
from library.generating.requests import PictureRequest, PromptLine, Requests, prompt_lines, usual_request
from library.given_files import check_lora_keys, check_network, check_vae
from library.network_choice import check_network_module
from library.options.derived import DEFAULT_NETWORK
from library.options.groups import ModelOptions
from library.preflight import Problems
from library.safetensors_header import read_header

logger = logging.getLogger(__name__)

MODULES = {  # by what their layers are, whatever the metadata say
    **dict.fromkeys(("lora", "bias", "norm"), DEFAULT_NETWORK),
    "loha": "networks.loha",
    "lokr": "networks.lokr",
    "oft": "networks.oft",
}
KIND_FLAGS = {"v1": "sd1", "v2": "sd2", "sdxl": "sdxl"}
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".jxl")


@dataclass(frozen=True)
class NetworkFile:
    """A network that a user names."""

    path: Path
    module: str = DEFAULT_NETWORK
    multiplier: float = 1.0
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prepared:
    """What is drawn with what."""

    checkpoint: CheckpointInfo
    family: str  # a key of library.families.FAMILIES
    model: ModelOptions
    networks: list[NetworkFile]
    requests: Requests
    pictures: list[PictureRequest]  # none where prompts are asked for
    begin_with: list[str]  # paths of --image_path

    @property
    def row(self) -> FamilyRow:
        return FAMILIES[self.family]

    def with_beginnings(self, pictures: list[PictureRequest]) -> list[PictureRequest]:
        """The pictures, each with one of --image_path in turn."""
        paths = self.begin_with
        return [replace(p, image_path=paths[i % len(paths)]) for i, p in enumerate(pictures)] if paths else pictures


def prepare_pictures(options: DrawOptions, wanted_family: str | None = None) -> Prepared:
    """Check all that was given; a UserError names every problem found."""
    problems = Problems()
    attempt = problems.attempt
    checkpoint = attempt(inspect_checkpoint, options.ckpt, "--ckpt")
    family = attempt(family_for, checkpoint, wanted_family) if checkpoint else None
    model = model_options(options, checkpoint) if family else None
    if model:
        problems += kind_problems(options, checkpoint)
        attempt(check_clip_skip, model, checkpoint)
    if options.vae:
        attempt(check_vae, options.vae, checkpoint)
    problems += check_writable("outdir", options.outdir)
    networks = network_files(options)
    for network in networks:
        problems += network_problems(network, checkpoint, "network_weights")
    begin_with = attempt(pictures_to_begin_with, options.image_path) if options.image_path else []
    side = FAMILIES[family].usual_side if family else 512
    requests = Requests(options, usual_request(options, (side, side)), len(networks))
    lines: list[PromptLine] = attempt(prompt_lines, options) or []
    pictures = attempt(requests.of_rounds, lines) if lines else []
    if problems:
        raise UserError(*problems)
    return Prepared(checkpoint, family, model, networks, requests, pictures, begin_with)


def family_for(checkpoint: CheckpointInfo, wanted: str | None) -> str:
    try:
        return family_of_kind(checkpoint, wanted)
    except UserError:
        kind = "Stable Diffusion XL" if wanted == "sdxl" else "Stable Diffusion 1.x, 2.x or XL"
        raise UserError(
            f"--ckpt: {checkpoint.path} is a {checkpoint.description}; this script draws with {kind}"
        ) from None


def model_options(options: DrawOptions, checkpoint: CheckpointInfo) -> ModelOptions:
    """What a family is loaded with; that a model predicts velocity may be in its folder."""
    return ModelOptions(
        pretrained_model_name_or_path=options.ckpt,
        v_parameterization=options.v_parameterization or bool(folder_predicts_v(checkpoint)),
        vae=options.vae,
        clip_skip=options.clip_skip,
        no_half_vae=options.no_half_vae,
    )


def kind_problems(options: DrawOptions, checkpoint: CheckpointInfo) -> list[str]:
    """A sentence for each flag that takes the model for another kind."""
    return [
        f"--{name} does not go with {checkpoint.path}, which is a {checkpoint.description}: leave it out"
        for name, kind in KIND_FLAGS.items()
        if getattr(options, name) and kind != checkpoint.kind
    ]


def network_files(options: DrawOptions) -> list[NetworkFile]:
    """The networks of the flags, with what belongs to each."""
    paths = options.network_weights or []
    given = options.network_module or []
    given = given * len(paths) if len(given) == 1 else [*given, *(None for _ in paths)]
    modules = [module or module_of(Path(path)) for path, module in zip(paths, given, strict=False)]
    multipliers = [*(options.network_mul or []), *(1.0 for _ in paths)]
    arguments = [*(options.network_args or []), *("" for _ in paths)]
    return [
        NetworkFile(Path(path), module, multiplier, tuple(item for item in text.split(";") if item))
        for path, module, multiplier, text in zip(paths, modules, multipliers, arguments, strict=False)
    ]


def module_of(path: Path) -> str:
    """The algorithm that the keys of a file tell, or its metadata; networks.lora where they tell none that is ours."""
    try:
        header = read_header(path, "")
    except (UserError, OSError):  # which is told elsewhere
        return DEFAULT_NETWORK
    made_by = next((layer.algorithm for layer in sort_keys(header.shapes).layers.values()), None)
    if made_by in MODULES or not header.shapes:
        return MODULES.get(made_by, DEFAULT_NETWORK)
    named = header.metadata.get("ss_network_module", "")
    is_here = named.startswith("networks.") and not check_network_module(named)
    return named if is_here else DEFAULT_NETWORK


def network_problems(network: NetworkFile, checkpoint: CheckpointInfo | None, flag: str) -> list[str]:
    """What is wrong with a network's file and algorithm, as far as that can be told without torch."""
    problems = Problems(check_network_module(network.module))
    is_ours = network.module.startswith("networks.")
    shapes = problems.attempt(check_network, str(network.path), f"--{flag}", checkpoint, is_ours)
    if shapes and network.module == DEFAULT_NETWORK:
        problems.attempt(check_lora_keys, str(network.path), f"--{flag}", shapes)
    return problems


def pictures_to_begin_with(path_text: str) -> list[str]:
    """The picture at a path, or those of a folder in the order of their names; each can be read."""
    path = Path(path_text)
    found = sorted(p for p in path.iterdir() if p.suffix.lower() in PICTURES) if path.is_dir() else [path]
    if not found:
        raise UserError(f"--image_path: {path} has no pictures")
    damaged = []
    for picture in found:
        try:
            with open_picture(picture) as image:
                image.load()
        except Exception as error:  # Pillow's readers raise many kinds on damaged files
            damaged.append(f"{picture} ({unreadable_reason(picture, error)})")
    if damaged:
        raise UserError(f"--image_path: no pictures that can be read: {quoted_list(damaged, 3)}")
    return [str(picture) for picture in found]


def meaningless_options(options: DrawOptions, prepared: Prepared) -> list[str]:
    """A sentence for each thing that is given and has no effect on this model."""
    warnings = options.warnings()
    if not prepared.row.takes_sizes:
        names = ("original_width", "original_height", "crop_left", "crop_top")
        warnings += [f"--{n} has no effect: it is for SDXL" for n in names if getattr(options, n) is not None]
    if prepared.row.text_layer and options.clip_skip is not None:
        warnings.append(f"--clip_skip has no effect: with this model it is always {prepared.row.text_layer}")
    texts = [f"{p.prompt} {p.negative_prompt}" for p in prepared.pictures]
    if any(" BREAK " in text for text in texts):
        warnings.append("BREAK in a prompt is a word like any other here")
    if any(" AND " in text for text in texts):
        warnings.append("AND in a prompt is a word like any other here: networks apply to the whole picture")
    if options.network_merge and any(picture.network_mul for picture in prepared.pictures):
        warnings.append("--am has no effect on networks that are merged")
    return warnings
