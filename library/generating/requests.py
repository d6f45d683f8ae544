"""Pictures that are asked for: prompt lines with kohya's options, seeds and sizes. Needs no torch."""

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from library.errors import UserError
from library.files import read_user_text
from library.generating.dynamic_prompts import Wildcards, variants_of
from library.generating.options import PictureFlags, PromptFlags
from library.options.checks import file_name
from library.options.groups import MAX_SEED, SAMPLERS
from library.training.prompts import MAX_SIDE, SamplePrompt, rounded

NUMBER = r"\d+\.?\d*|\.\d+"
SIGNED = rf"[+-]?(?:{NUMBER})"
# of features that are not here
UNSUPPORTED = ("c", "dsd1", "dst1", "dsd2", "dst2", "dsr", "glt", "glr", "gle", "gls", "glsn", "glus")


@dataclass(frozen=True)
class PictureRequest(SamplePrompt):
    """One picture to draw; sizes in pixels."""

    raw_prompt: str = ""  # before choices were made
    negative_scale: float | None = None
    strength: float | None = None  # of what is drawn anew
    network_mul: tuple[float, ...] | None = None  # of each network; None leaves those of the flags
    original_wh: tuple[int | None, int | None] = (None, None)
    original_wh_negative: tuple[int | None, int | None] = (None, None)
    crop_left_top: tuple[int, int] = (0, 0)
    file_name: str | None = None
    image_path: str | None = None

    @property
    def sizes(self) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """The six numbers of SDXL for the prompt and the negative prompt; None where they are a whole picture's."""
        if not (any(self.original_wh + self.original_wh_negative) or any(self.crop_left_top)):
            return None
        left, top = self.crop_left_top

        def of(original_wh: tuple[int | None, int | None]) -> tuple[int, ...]:
            width, height = original_wh
            return height or self.height, width or self.width, top, left, self.height, self.width

        negative = self.original_wh_negative if any(self.original_wh_negative) else self.original_wh
        return of(self.original_wh), of(negative)


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def _seeds(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


# letters -> what the value must be, the name it is noted under, conversion
LINE_OPTIONS: dict[str, tuple[str, str, Callable[[str], Any]]] = {
    "w": (r"\d+", "width", int),
    "h": (r"\d+", "height", int),
    "ow": (r"\d+", "original_width", int),
    "oh": (r"\d+", "original_height", int),
    "nw": (r"\d+", "original_width_negative", int),
    "nh": (r"\d+", "original_height_negative", int),
    "ct": (r"\d+", "crop_top", int),
    "cl": (r"\d+", "crop_left", int),
    "s": (r"\d+", "sample_steps", int),
    "d": (r"\d+(?:\s*,\s*\d+)*", "seeds", _seeds),
    "l": (NUMBER, "scale", float),
    "nl": (rf"{NUMBER}|none", "negative_scale", lambda text: None if text == "none" else float(text)),
    "t": (NUMBER, "strength", float),
    "n": (r".+", "negative_prompt", str),
    "ss": (r".+", "sample_sampler", str),
    "am": (rf"{SIGNED}(?:\s*,\s*{SIGNED})*", "network_mul", _numbers),
    "f": (r".+", "file_name", str),
}


def parse_line(line: str, where: str) -> tuple[str, dict[str, Any]]:
    """The prompt of a line such as `a cat --n blurry --w 512 --d 1,2 --am 0.8`, and the values of its options."""
    prompt, *options = line.strip().split(" --")
    values: dict[str, Any] = {}
    for option in options:
        name, _, text = (part.strip() for part in option.strip().partition(" "))
        name = name.lower()
        if name in UNSUPPORTED:
            raise UserError(f"{where}: --{name} belongs to a feature that is not in this suite; leave it out")
        if name not in LINE_OPTIONS:
            raise UserError(f"{where}: there is no option --{name}; known are {', '.join(LINE_OPTIONS)}")
        pattern, key, convert = LINE_OPTIONS[name]
        if not re.fullmatch(pattern, text) or (convert is not str and len(text) > 200):
            raise UserError(f"{where}: --{name} cannot be {text!r}")
        values[key] = convert(text)
    return prompt.strip(), values


@dataclass(frozen=True)
class PromptLine:
    """A line that asks for pictures, and where it stands."""

    text: str
    where: str


def prompt_lines(options: PromptFlags) -> list[PromptLine]:
    """The lines of --prompt or --from_file; none where they are asked for."""
    if options.prompt:
        return [PromptLine(options.prompt, "--prompt")]
    if options.interactive:
        return []
    path = Path(options.from_file)
    lines = read_user_text(path, f"--from_file: {path}").splitlines()
    found = [
        PromptLine(line.strip(), f"--from_file: {path}, line {number}")
        for number, line in enumerate(lines, 1)
        if line.strip() and not line.startswith("#")
    ]
    if not found:
        raise UserError(f"--from_file: {path} has no prompts")
    return found


class Requests:
    """The pictures of prompt lines, one after the other: choices and seeds are drawn from --seed."""

    def __init__(self, options: PromptFlags, usual: PictureRequest, num_networks: int):
        """`usual` has what lines without options get."""
        self.options, self.usual, self.num_networks = options, usual, num_networks
        self.rng = random.Random(options.seed) if options.seed is not None else random.SystemRandom()
        self.wildcards = Wildcards(options.wildcard_dir)
        self.round_seed: int | None = None

    def of_rounds(self, lines: list[PromptLine]) -> list[PictureRequest]:
        """All pictures of a run; UserError names every line that cannot be drawn."""
        problems, found = [], []
        for number in range(self.options.n_iter):
            self.begin_round(number)
            ordered = self.rng.sample(lines, len(lines)) if self.options.shuffle_prompts else lines
            for line in ordered:
                try:
                    found += self.of_line(line)
                except UserError as error:
                    problems += error.problems
            if problems:
                raise UserError(*problems)
        if len(found) == 1 and self.options.seed is not None and not seeds_in(lines[0].text):
            found = [replace(found[0], seed=self.options.seed)]
        return [replace(request, enum=number) for number, request in enumerate(found)]

    def begin_round(self, number: int) -> None:
        """The seed that all prompts of a round share with --iter_same_seed."""
        if self.options.iter_same_seed:
            is_given = number == 0 and self.options.seed is not None
            self.round_seed = self.options.seed if is_given else self._draw_seed()

    def of_line(self, line: PromptLine) -> list[PictureRequest]:
        """The pictures that a line asks for: as many as --images_per_prompt, its seeds or its combinations."""
        seeds = seeds_in(line.text)
        count = max(self.options.images_per_prompt, len(seeds))
        requests = []
        for text in variants_of(line.text, count, self.rng, self.wildcards):
            prompt, values = parse_line(text, line.where)
            seed = seeds.pop(0) if seeds else self.round_seed
            requests.append(self._request(prompt, values, self._draw_seed() if seed is None else seed, line))
        return requests

    def _draw_seed(self) -> int:
        return self.rng.randint(0, 2**31 - 1)

    def _request(self, prompt: str, values: dict[str, Any], seed: int, line: PromptLine) -> PictureRequest:
        pairs = {
            "original_wh": ("original_width", "original_height"),
            "original_wh_negative": ("original_width_negative", "original_height_negative"),
            "crop_left_top": ("crop_left", "crop_top"),
        }
        values = {name: value for name, value in values.items() if name != "seeds"}
        for field, names in pairs.items():
            before = getattr(self.usual, field)
            values[field] = tuple(values.pop(name, old) for name, old in zip(names, before, strict=True))
        request = replace(self.usual, prompt=prompt, raw_prompt=line.text, seed=seed, **values)
        if problems := list(problems_of_request(request, self.num_networks)):
            raise UserError(*(f"{line.where}: {problem}" for problem in problems))
        return rounded(request)


def problems_of_request(request: PictureRequest, num_networks: int) -> Iterator[str]:
    """What cannot be drawn of a line."""
    if request.sample_sampler not in (None, *SAMPLERS):
        yield f"there is no sampler {request.sample_sampler}; known are {', '.join(SAMPLERS)}"
    if max(request.width, request.height) > MAX_SIDE:
        yield f"a side must be at most {MAX_SIDE} pixels, got {max(request.width, request.height)}"
    if not 0 <= request.seed <= MAX_SEED:
        yield f"a seed must be between 0 and {MAX_SEED}, got {request.seed}"
    if request.strength is not None and not 0 <= request.strength <= 1:
        yield f"--t must be from 0 to 1, got {request.strength:g}"
    if request.network_mul and len(request.network_mul) > num_networks:
        yield f"--am has {len(request.network_mul)} multipliers for {num_networks} networks"
    yield from file_name("f", request.file_name, "outdir")


def seeds_in(text: str) -> list[int]:
    """The seeds of a line whose choices are not made yet."""
    match = re.search(r"\s--d\s+(\d{1,20}(?:\s*,\s*\d{1,20})*)", text, re.IGNORECASE)
    return list(_seeds(match[1])) if match else []


def usual_request(options: PictureFlags, size_wh: tuple[int, int]) -> PictureRequest:
    """What the flags say of every picture."""
    width, height = size_wh
    return PictureRequest(
        prompt="",
        width=options.W or width,
        height=options.H or height,
        sample_steps=options.steps,
        scale=options.scale,
        sample_sampler=options.sampler,
        negative_scale=options.negative_scale,
        strength=options.strength,
        original_wh=(options.original_width, options.original_height),
        original_wh_negative=(options.original_width_negative, options.original_height_negative),
        crop_left_top=(options.crop_left or 0, options.crop_top or 0),
    )
