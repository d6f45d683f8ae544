"""Values that follow from options; the options themselves are never changed."""

import ast
import re
from dataclasses import dataclass
from typing import Any

from library.errors import UserError
from library.network_rules import rules_of

DEFAULT_NETWORK = "networks.lora"
MAX_SIDE = 16384  # pixels
PROMPT_SUFFIXES = (".txt", ".toml", ".json")


def resolution_wh(options: Any) -> tuple[int, int]:
    """Width and height in pixels of `--resolution`, written "512", "512,768" or "512x768"."""
    text = options.resolution
    if text is None:
        raise UserError("--resolution is required, for example 512,512 (width,height)")
    match = re.fullmatch(r"\s*(\d{1,9})\s*(?:[,xX]\s*(\d{1,9})\s*)?", text)
    if match is None or 0 in (sides := [int(side) for side in match.groups(default=match[1])]):
        raise UserError(f"--resolution must be a size such as 512 or 512,768 (width,height), got {text!r}")
    if max(sides) > MAX_SIDE:
        raise UserError(f"--resolution must be at most {MAX_SIDE} pixels a side, got {text!r}")
    return sides[0], sides[1]


def face_crop_range(options: Any) -> tuple[float, float] | None:
    """The two numbers of `--face_crop_aug_range`, the smaller first."""
    text = options.face_crop_aug_range
    if not text:
        return None
    try:
        smallest, largest = (float(part) for part in text.split(","))
    except ValueError:
        smallest = largest = 0.0
    if not 0 < smallest <= largest < float("inf"):
        raise UserError(f"--face_crop_aug_range must be two numbers such as 2.0,4.0, the smaller first, got {text!r}")
    return smallest, largest


def optimizer_name(options: Any) -> str:
    """The optimizer's name as the user wrote it; AdamW where nothing says otherwise."""
    if options.use_8bit_adam:
        return "AdamW8bit"
    if options.use_lion_optimizer:
        return "Lion"
    return options.optimizer_type or "AdamW"


def is_schedule_free(name: str) -> bool:
    """Whether an optimizer of this name brings its own schedule of the learning rate."""
    return name.lower().endswith("schedulefree")


def takes_relative_steps(given: dict[str, Any]) -> bool:
    """Whether Adafactor with these arguments chooses its rate (arXiv:1804.04235, section 8); warmup_init needs that."""
    return bool(given.get("relative_step", True) or given.get("warmup_init", False))


def chooses_own_rate(options: Any) -> bool:
    """Whether the optimizer follows no schedule: schedule-free ones do not, nor Adafactor in relative steps."""
    name = optimizer_name(options).lower()
    if name == "adafactor":
        return takes_relative_steps(parse_key_values(options.optimizer_args, "optimizer_args"))
    return is_schedule_free(name)


def has_dropout(options: Any) -> bool:
    """Whether the network draws random numbers in a forward pass, as far as its arguments and rules tell."""
    names = ("dropout", "rank_dropout", "module_dropout", "ggpo_sigma")
    given = network_arguments(options)
    draws = options.network_dropout or getattr(rules_of(network_module(options)), "DRAWS_NUMBERS", False)
    return bool(draws) or any(given.get(name, "0") not in ("0", "0.0", "None") for name in names)


def network_module(options: Any) -> str:
    """The module of the network to train."""
    return options.network_module or DEFAULT_NETWORK


def caption_extension(options: Any) -> str:
    """The ending of caption files, with its dot; the misspelt flag of old scripts goes first."""
    return with_dot(options.caption_extention or options.caption_extension)


def with_dot(extension: str) -> str:
    """The ending of a file's name, which users also write without its dot."""
    return extension if extension.startswith(".") else f".{extension}"


def names_prompt_file(sample_prompts: str) -> bool:
    """Whether `--sample_prompts` is a path, by its ending; anything else is the prompts themselves."""
    return sample_prompts.lower().endswith(PROMPT_SUFFIXES)


def resumes_newest(options: Any) -> bool:
    """Whether `--resume auto` asks for the newest state of this run."""
    return options.resume == "auto" and not options.resume_from_huggingface


def caches_latents(options: Any) -> bool:
    """Whether latents are computed once; caching to disk implies it."""
    return options.cache_latents or options.cache_latents_to_disk


def caches_text(options: Any) -> bool:
    """Whether the outputs of text encoders must be computed once; caching to disk implies it."""
    return options.cache_text_encoder_outputs or options.cache_text_encoder_outputs_to_disk


def unet_rounding(options: Any) -> str | None:
    """How the frozen U-Net is stored in fewer bits, as --base_quantization names it; None where it is not."""
    return options.base_quantization or ("fp8" if options.fp8_base or options.fp8_base_unet else None)


def rounds_text(options: Any) -> bool:
    """Whether text encoders are stored in fp8, which --fp8_base_unet takes back."""
    return options.fp8_base and not options.fp8_base_unet


def learning_rates(options: Any) -> tuple[float | tuple[float, ...], float]:
    """Learning rates of text encoder and U-Net; only None falls back to --learning_rate, 0 means not trained.

    Where text encoders are given different rates, there is one for each.
    """
    given = options.text_encoder_lr or [options.learning_rate]
    unet = options.learning_rate if options.unet_lr is None else options.unet_lr
    return given[0] if len(set(given)) == 1 else tuple(given), unet


def trained_rates(options: Any) -> list[float]:
    """The learning rates of the parts that are trained."""
    rates = [] if options.network_train_unet_only else list(options.text_encoder_lr or [options.learning_rate])
    rates += [] if options.network_train_text_encoder_only else [learning_rates(options)[1]]
    return [rate for rate in rates if rate]


def tracker_names(options: Any) -> list[str]:
    """The trackers that curves go to; --logging_dir alone stands for TensorBoard."""
    if options.log_with == "all":
        return ["tensorboard", "wandb"]
    if options.log_with:
        return [options.log_with]
    return ["tensorboard"] if options.logging_dir else []


@dataclass(frozen=True)
class HubPlace:
    """A folder in a repository on the Hugging Face hub."""

    repo_id: str
    path: str
    revision: str | None
    repo_type: str | None


def hub_place(text: str) -> HubPlace:
    """What --resume names with --resume_from_huggingface: owner/repo/path[:revision[:type]]."""
    place, *rest = text.split(":")
    owner, repo, path = [*place.strip("/").split("/", 2), "", ""][:3]
    if not (owner and repo and path) or len(rest) > 2:
        raise UserError(f"--resume must be OWNER/REPO/FOLDER[:REVISION[:TYPE]] on Hugging Face, got {text!r}")
    revision, repo_type = [part or None for part in (*rest, None, None)[:2]]
    return HubPlace(f"{owner}/{repo}", path, revision, repo_type)


def parse_key_values(items: list[str] | None, flag: str) -> dict[str, Any]:
    """The arguments of an optimizer or scheduler: Python literals, and a bare word is a string."""
    arguments = {}
    for item in items or []:
        key, separator, text = item.partition("=")
        if not key.strip() or not separator or "=" in text:
            raise UserError(f"--{flag} takes key=value with one equals sign, got {item!r}")
        arguments[key.strip()] = _literal(text.strip())
    return arguments


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def network_arguments(options: Any) -> dict[str, str]:
    """`--network_args` split at the first equals sign; the values stay strings."""
    arguments = {}
    for item in options.network_args or []:
        key, separator, text = item.partition("=")
        if not key.strip() or not separator:
            raise UserError(f"--network_args takes key=value, got {item!r}")
        if re.search(r"\s\w+=", text):
            raise UserError(f"--network_args takes one key=value an item, got {item!r}: write them as separate items")
        arguments[key.strip()] = text
    return arguments
