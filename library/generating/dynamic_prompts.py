"""Prompts with choices in them: {a|b|c}, and lines of wildcard files. Needs no torch.

`{2$$a|b|c}` takes two of them, `{1-2$$ and $$a|b|c}` one or two with " and " between, and `{e$$a|b}` makes a prompt of
each. `__name__` is a line of name.txt.
"""

import itertools
import random
import re
from dataclasses import dataclass
from pathlib import Path

from library.errors import UserError
from library.files import read_user_text

MAX_PROMPTS = 10_000  # that one prompt may become
MAX_ROUNDS = 20  # of choices in what was chosen

_CHOICE = re.compile(r"\{([^{}]*)\}")  # the innermost ones
_WILDCARD = re.compile(r"__([\w\-/ ]+?)__")


@dataclass(frozen=True)
class Choice:
    """What stands in one pair of braces."""

    variants: list[str]
    is_each: bool = False
    fewest: int = 1
    most: int = 1
    separator: str = ", "


def variants_of(prompt: str, count: int, rng: random.Random, wildcards: "Wildcards | None" = None) -> list[str]:
    """The prompt with choices made, `count` times; all combinations, as often, where it has `{e$$...}`."""
    wildcards = wildcards or Wildcards(None)
    made = []
    for _ in range(count):
        found = [prompt]
        for _ in range(MAX_ROUNDS):
            if not any(_CHOICE.search(text) or wildcards.has(text) for text in found):
                break
            found = [text for one in found for text in _one_round(wildcards.filled(one, rng), rng)]
            if len(found) > MAX_PROMPTS:
                raise UserError(f"--prompt: {prompt!r} has more than {MAX_PROMPTS} combinations")
        made += found
    return made


def _one_round(text: str, rng: random.Random) -> list[str]:
    """The text with its innermost choices made: one text, or one for each combination of those that want all."""
    choices = [_choice_of(match[1]) for match in _CHOICE.finditer(text)]
    values = [choice.variants if choice.is_each else [_chosen(choice, rng)] for choice in choices]
    pieces = _CHOICE.split(text)[::2]
    return [
        "".join(itertools.chain.from_iterable(itertools.zip_longest(pieces, combination, fillvalue="")))
        for combination in itertools.product(*values)
    ]


def _choice_of(inside: str) -> Choice:
    head, mark, rest = inside.partition("$$")
    if not mark:
        return Choice(inside.split("|"))
    if head.strip() == "e":
        return Choice(rest.split("|"), is_each=True)
    match = re.fullmatch(r"\s*(\d{1,4})(?:-(\d{1,4}))?\s*", head)
    if match is None:
        raise UserError(f"--prompt: {{{inside}}} begins with {head!r}; it takes a number, a range such as 1-2, or e")
    separator, mark, variants = rest.partition("$$")
    if not mark:
        separator, variants = ", ", rest
    fewest, most = sorted((int(match[1]), int(match[2] or match[1])))
    return Choice(variants.split("|"), False, fewest, most, separator)


def _chosen(choice: Choice, rng: random.Random) -> str:
    count = min(rng.randint(choice.fewest, choice.most), len(choice.variants))
    return choice.separator.join(rng.sample(choice.variants, count))


class Wildcards:
    """The lines of the files in a folder, by the files' names."""

    def __init__(self, folder: str | None):
        self.folder = Path(folder) if folder else None
        self._lines: dict[str, list[str]] = {}

    def has(self, text: str) -> bool:
        return self.folder is not None and _WILDCARD.search(text) is not None

    def filled(self, text: str, rng: random.Random) -> str:
        return _WILDCARD.sub(lambda match: rng.choice(self._of(match[1])), text) if self.has(text) else text

    def _of(self, name: str) -> list[str]:
        if name not in self._lines:
            path = self.folder / f"{name}.txt"
            lines = read_user_text(path, f"--wildcard_dir: {path}").splitlines()
            self._lines[name] = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
            if not self._lines[name]:
                raise UserError(f"--wildcard_dir: {path} has no lines")
        return self._lines[name]
