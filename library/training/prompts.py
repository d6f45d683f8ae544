"""Sample prompts: one picture a line with its options, or the same in a TOML or JSON file. Needs no torch."""

import json
import logging
import re
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path

from library.errors import UserError
from library.files import read_user_text
from library.options.config_file import parse_toml as read_toml
from library.options.derived import names_prompt_file
from library.options.groups import MAX_SEED, SAMPLERS
from library.texts import read_json

logger = logging.getLogger(__name__)

DEFAULT_STEPS = 30
DEFAULT_SIZE = 512
DEFAULT_SCALE = 7.5
MAX_SIDE = 16384  # pixels
MAX_DIGITS = 100  # of a number in a prompt line


@dataclass(frozen=True)
class SamplePrompt:
    """A picture to draw during training. Sizes in pixels, multiples of 8."""

    prompt: str
    negative_prompt: str = ""
    width: int = DEFAULT_SIZE
    height: int = DEFAULT_SIZE
    sample_steps: int = DEFAULT_STEPS
    scale: float = DEFAULT_SCALE  # of classifier-free guidance
    seed: int | None = None
    sample_sampler: str | None = None
    enum: int = 0  # its number among the prompts


# letter -> pattern of its value, field, conversion
LINE_OPTIONS = {
    "w": (r"\d+", "width", int),
    "h": (r"\d+", "height", int),
    "d": (r"\d+", "seed", int),
    "s": (r"\d+", "sample_steps", int),
    "l": (r"\d+\.?\d*|\.\d+", "scale", float),
    "n": (r".+", "negative_prompt", str),
    "ss": (r".+", "sample_sampler", str),
}
OTHER_FAMILIES_OPTIONS = ("g", "cn", "ctr", "rcfg", "fs")  # of FLUX, ControlNet and others; no meaning for SD
OTHER_FAMILIES_KEYS = ("guidance_scale", "controlnet_image", "cfg_trunc_ratio", "renorm_cfg", "flow_shift")
FILE_KEYS = {"prompt": str} | {field: kind for _, field, kind in LINE_OPTIONS.values()}
TYPE_NAMES = {str: "text", int: "a whole number", float: "a number"}


def prompts_of(sample_prompts: str) -> list[SamplePrompt]:
    """The prompts that `--sample_prompts` names as a file, or is itself, one a line."""
    if names_prompt_file(sample_prompts):
        return read_prompts(Path(sample_prompts))
    return checked(parse_lines(sample_prompts, "the text"), "the text")


def read_prompts(path: Path) -> list[SamplePrompt]:
    """The prompts of a .txt, .toml or .json file; UserError names file and line of what cannot be read."""
    text = read_user_text(path, f"--sample_prompts: {path}")
    try:
        entries = READERS[path.suffix.lower()](text, str(path))
    except json.JSONDecodeError as error:
        raise UserError(f"--sample_prompts: {path} cannot be read: {error}") from error
    return checked(entries, str(path))


def checked(entries: list[SamplePrompt], place: str) -> list[SamplePrompt]:
    """The prompts numbered, with sizes and steps that can be drawn; UserError where there is none or one cannot be."""
    if not entries:
        raise UserError(f"--sample_prompts: {place} has no prompts")
    unknown = [entry.sample_sampler for entry in entries if entry.sample_sampler not in (None, *SAMPLERS)]
    if unknown:
        raise UserError(f"--sample_prompts: {place}: there is no sampler {unknown[0]}; known are {', '.join(SAMPLERS)}")
    if large := [entry.seed for entry in entries if not 0 <= (entry.seed or 0) <= MAX_SEED]:
        raise UserError(f"--sample_prompts: {place}: a seed must be between 0 and {MAX_SEED}, got {large[0]}")
    if large := [side for entry in entries for side in (entry.width, entry.height) if side > MAX_SIDE]:
        raise UserError(f"--sample_prompts: {place}: a side must be at most {MAX_SIDE} pixels, got {large[0]}")
    if odd := [entry.scale for entry in entries if not isfinite(entry.scale)]:
        raise UserError(f"--sample_prompts: {place}: scale must be a finite number, got {odd[0]}")
    return [replace(rounded(entry), enum=index) for index, entry in enumerate(entries)]


def parse_lines(text: str, place: str) -> list[SamplePrompt]:
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if not line.startswith("#")]
    return [parse_line(line, f"{place}, line {number}") for number, line in lines if line]


def parse_toml(text: str, place: str) -> list[SamplePrompt]:
    """A table `[prompt]` with what all share, and `[[prompt.subset]]` for each picture."""
    shared = read_toml(f"--sample_prompts: {place}", text).get("prompt", {})
    subsets = shared.pop("subset", []) if isinstance(shared, dict) else None
    if not isinstance(subsets, list) or not all(isinstance(subset, dict) for subset in subsets):
        raise UserError(f"--sample_prompts: {place} needs a table [prompt] with tables [[prompt.subset]]")
    return [parse_table({**shared, **subset}, place) for subset in subsets]


def parse_json(text: str, place: str) -> list[SamplePrompt]:
    """A list of prompt lines and of objects."""
    entries = read_json(text)
    if not isinstance(entries, list) or not all(isinstance(entry, str | dict) for entry in entries):
        raise UserError(f"--sample_prompts: {place} must hold a list of texts or objects")
    return [parse_line(e, place) if isinstance(e, str) else parse_table(e, place) for e in entries]


READERS = {".txt": parse_lines, ".toml": parse_toml, ".json": parse_json}


def parse_line(line: str, where: str) -> SamplePrompt:
    """`a cat --n blurry --w 512 --h 768 --d 1 --l 7 --s 28`; the prompt stands first."""
    prompt, *options = line.split(" --")
    values: dict[str, object] = {}
    for option in options:
        name, _, value = option.strip().partition(" ")
        if name.lower() in OTHER_FAMILIES_OPTIONS:
            logger.warning("--sample_prompts: %s: --%s has no meaning for this model", where, name)
            continue
        if name.lower() not in LINE_OPTIONS:
            raise UserError(
                f"--sample_prompts: {where}: there is no option --{name}; known are {', '.join(LINE_OPTIONS)}"
            )
        pattern, field, convert = LINE_OPTIONS[name.lower()]
        match = re.match(pattern, value.strip())
        if match is None or (convert is not str and len(match[0]) > MAX_DIGITS):
            raise UserError(f"--sample_prompts: {where}: --{name} cannot be {value!r}")
        values[field] = convert(match[0])
    return SamplePrompt(prompt.strip(), **values)


def parse_table(table: dict, place: str) -> SamplePrompt:
    unknown = set(table) - set(FILE_KEYS) - set(OTHER_FAMILIES_KEYS)
    if unknown or "prompt" not in table:
        what = f"unknown key {sorted(unknown)[0]}" if unknown else "an entry has no prompt"
        raise UserError(f"--sample_prompts: {place}: {what}")
    for key in table:
        if key in OTHER_FAMILIES_KEYS:
            logger.warning("--sample_prompts: %s: %s has no meaning for this model", place, key)
    values = {key: value for key, value in table.items() if key in FILE_KEYS}
    for key, value in values.items():
        wanted = FILE_KEYS[key]
        if isinstance(value, bool) or not isinstance(value, (int, float) if wanted is float else wanted):
            raise UserError(f"--sample_prompts: {place}: {key} must be {TYPE_NAMES[wanted]}, got {value!r}")
    return SamplePrompt(**values)


def rounded(prompt: SamplePrompt) -> SamplePrompt:
    """Sizes floored to multiples of 8 (at least 64), steps within 1..1000."""
    return replace(
        prompt,
        width=max(64, prompt.width - prompt.width % 8),
        height=max(64, prompt.height - prompt.height % 8),
        sample_steps=min(1000, max(1, prompt.sample_steps)),
    )
