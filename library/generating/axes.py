"""The axes of a grid of pictures: what changes along each, and its values. Needs no torch."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from library.errors import UserError
from library.generating.requests import PictureRequest
from library.generating.runs import SavedNetwork
from library.options.groups import MAX_SEED, SAMPLERS

MAX_VALUES = 200  # of one axis
USUAL_STRENGTHS = "0.5-1.0"
DECIMAL_STEP = 0.1


@dataclass(frozen=True)
class Cell:
    """One picture of a grid: with which network how strong, and what is asked; no network is the model alone."""

    network: SavedNetwork | None
    strength: float
    request: PictureRequest


@dataclass(frozen=True)
class Value:
    """A place on an axis: what stands beside it, and what it makes of a cell."""

    label: str
    change: Callable[[Cell], Cell]


@dataclass(frozen=True)
class Axis:
    name: str  # as it is shown: "epoch", "strength", ...
    values: list[Value]


def build_axis(text: str, flag: str, networks: list[SavedNetwork], prompts: list[PictureRequest]) -> Axis:
    """The axis of a text such as `epoch`, `strength=0.5-1.0`, `seed=1,2,3`, `sampler=ddim,euler_a`."""
    kind, _, values = text.partition("=")
    kind, values = kind.strip().lower(), values.strip()
    if kind not in AXES:
        raise UserError(f"{flag}: there is no axis {kind!r}; known are {', '.join(AXES)}")
    made = AXES[kind](values, flag, networks, prompts)
    if not made:
        raise UserError(f"{flag} {kind}: there is nothing to show")
    if len(made) > MAX_VALUES:
        raise UserError(f"{flag} {kind}: {len(made)} values are too many, at most {MAX_VALUES}")
    return Axis("CFG scale" if kind in ("cfg", "scale") else kind, made)


def _epochs(values: str, flag: str, networks: list[SavedNetwork], _: list[PictureRequest]) -> list[Value]:
    """All networks, or those of the epochs that are named; `step300` and `last` name others, 0 none."""
    chosen: list[SavedNetwork | None] = list(networks)
    if values:
        named = {_name_of(network): network for network in networks}
        known = {**named, "0": None, "none": None, **({"last": networks[-1]} if networks else {})}
        names = [part.strip() for part in values.split(",")]
        if unknown := [name for name in names if name not in known]:
            raise UserError(f"{flag} epoch: there is no file of {unknown[0]}; there are {', '.join(named)}")
        chosen = [known[name] for name in names]
    return [Value(n.label if n else "without", lambda cell, n=n: replace(cell, network=n)) for n in chosen]


def _name_of(network: SavedNetwork) -> str:
    """How a network is named on the command line: 5, step300, last, or a file's name."""
    return f"step{network.step}" if network.step is not None else network.label.removeprefix("epoch ")


def _strengths(values: str, flag: str, *_: Any) -> list[Value]:
    numbers = numbers_of(values or USUAL_STRENGTHS, flag, "strength", DECIMAL_STEP)
    return [Value(f"{number:g}", lambda cell, n=number: replace(cell, strength=n)) for number in numbers]


def _prompts(values: str, flag: str, _: list[SavedNetwork], prompts: list[PictureRequest]) -> list[Value]:
    chosen = range(len(prompts))
    if values:
        chosen = [int(number) - 1 for number in numbers_of(values, flag, "prompt", 1)]
        if wrong := [number + 1 for number in chosen if not 0 <= number < len(prompts)]:
            raise UserError(f"{flag} prompt: there is no prompt {wrong[0]}; there are {len(prompts)}")
    return [Value(prompts[i].prompt, lambda cell, p=prompts[i]: replace(cell, request=p)) for i in chosen]


def _of_field(field: str, convert: Callable[[float], Any], low: float, high: float, step: float) -> Callable:
    def make(values: str, flag: str, *_: Any) -> list[Value]:
        if not values:
            raise UserError(f"{flag}: {field} needs values, for example 1,2,3 or 1-5")
        numbers = [convert(number) for number in numbers_of(values, flag, field, step)]
        if wrong := [number for number in numbers if not low <= number <= high]:
            raise UserError(f"{flag}: {field} must be between {low:g} and {high:g}, got {wrong[0]:g}")
        return [Value(f"{number:g}" if isinstance(number, float) else str(number), _setter(field, number))
                for number in numbers]  # fmt: skip

    return make


def _setter(field: str, value: Any) -> Callable[[Cell], Cell]:
    return lambda cell: replace(cell, request=replace(cell.request, **{field: value}))


def _samplers(values: str, flag: str, *_: Any) -> list[Value]:
    names = [part.strip() for part in values.split(",")]
    if unknown := [name for name in names if name not in SAMPLERS]:
        raise UserError(f"{flag}: there is no sampler {unknown[0]!r}; known are {', '.join(SAMPLERS)}")
    return [Value(name, _setter("sample_sampler", name)) for name in names]


AXES: dict[str, Callable[..., list[Value]]] = {
    "epoch": _epochs,
    "strength": _strengths,
    "prompt": _prompts,
    "seed": _of_field("seed", int, 0, MAX_SEED, 1),
    "sampler": _samplers,
    "cfg": _of_field("scale", float, 0, 1000, 1),
    "scale": _of_field("scale", float, 0, 1000, 1),
    "steps": _of_field("sample_steps", int, 1, 1000, 1),
}


def numbers_of(text: str, flag: str, what: str, usual_step: float) -> list[float]:
    """The numbers of `1,2.5` and of ranges: `0.5-1.0` in steps of 0.1 or 1 as is usual, `0-1:0.25` in steps of 0.25."""
    numbers: list[float] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(-?[\d.]+)(?:\s*-\s*(-?[\d.]+)(?::([\d.]+))?)?\s*", part)
        try:
            first, last, step = (float(n) if n else None for n in match.groups())
            if last is None:
                numbers.append(first)
                continue
            step = step or usual_step
            count = math.floor((last - first) / step + 1e-6) + 1
            if not 0 < count <= MAX_VALUES:
                raise ValueError
        except (ValueError, AttributeError):
            raise UserError(f"{flag}: {what} takes numbers and ranges such as 1,2 or 0-1:0.25, got {part!r}") from None
        numbers += [round(first + step * index, 6) for index in range(count)]
    return numbers
