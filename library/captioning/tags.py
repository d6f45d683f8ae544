"""From what a tagger says of a picture to its tags: thresholds, order, spelling. Needs no torch."""

import csv
import io
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from library.captioning.spelling import comparable, spaced
from library.errors import UserError
from library.files import read_user_text

# category in selected_tags.csv -> what it is; the numbers are Danbooru's, and 9 is the taggers' own
CATEGORIES = {0: "general", 1: "artist", 3: "copyright", 4: "character", 5: "meta", 9: "rating"}
SERIES = re.compile(r"(?P<name>.+?)[ _]*\((?P<series>[^()]+)\)")  # "reimu_(touhou)"


@dataclass(frozen=True)
class TagTable:
    """The tags that a tagger knows, in the order of its outputs."""

    names: list[str]
    categories: list[str]  # values of CATEGORIES

    def of(self, category: str) -> np.ndarray:
        """The places of the tags of a category."""
        return np.flatnonzero(np.array(self.categories) == category)


@dataclass(frozen=True)
class TagRules:
    """What becomes a tag, and how the tags of a picture are written."""

    thresholds: dict[str, float]  # by category
    remove_underscore: bool = False
    undesired: frozenset[str] = frozenset()
    replacements: dict[str, str] = field(default_factory=dict)
    expands_characters: bool = False  # "reimu_(touhou)" is two tags
    characters_first: bool = False
    rating: str | None = None  # where its tag goes: "first" or "last"
    always_first: tuple[str, ...] = ()
    separator: str = ", "


def read_tag_table(path: Path) -> TagTable:
    """The table of selected_tags.csv: at least the columns name and category."""
    rows = list(csv.DictReader(io.StringIO(read_user_text(path, str(path)))))
    if not rows or not {"name", "category"} <= rows[0].keys():
        raise UserError(f"{path} must be a table with the columns name and category, as taggers come with it")
    numbers = [(row["category"] or "").strip() for row in rows]
    if odd := [number for number in numbers if not number.isdecimal()]:
        raise UserError(f"{path}: category must be a number, got {odd[0]!r}")
    return TagTable([row["name"] or "" for row in rows], [CATEGORIES.get(int(n), f"category {n}") for n in numbers])


def parse_replacements(text: str) -> dict[str, str]:
    r"""What --tag_replacement writes as "from,to;from,to", with \, and \; for the marks themselves."""
    replacements = {}
    for pair in filter(None, _split(text, ";")):
        parts = _split(pair, ",")
        if len(parts) != 2 or not comparable(parts[0]):
            raise UserError(f"--tag_replacement takes pairs such as old,new;old2,new2, got {pair!r}")
        replacements[comparable(parts[0])] = parts[1].strip()
    return replacements


def _split(text: str, mark: str) -> list[str]:
    parts = re.split(rf"(?<!\\){mark}", text)
    return parts if mark == ";" else [re.sub(r"\\([,;])", r"\1", part) for part in parts]


class TagWriter:
    """Chooses and writes the tags of a picture by the rules."""

    def __init__(self, table: TagTable, rules: TagRules):
        self.table, self.rules = table, rules

    @cached_property
    def _limits(self) -> np.ndarray:
        """The threshold of every tag; none where its category gives no tags."""
        return np.array([self.rules.thresholds.get(name, np.inf) for name in self.table.categories], dtype=np.float32)

    @cached_property
    def _written(self) -> list[list[str]]:
        """What every tag is written as: nothing, one tag, or several."""
        return [self._spellings(*pair) for pair in zip(self.table.names, self.table.categories, strict=True)]

    def _spellings(self, name: str, category: str) -> list[str]:
        rules = self.rules
        if comparable(name) in rules.undesired:
            return []
        match = SERIES.fullmatch(name) if rules.expands_characters and category == "character" else None
        parts = [match["name"], match["series"]] if match else [name]
        parts = [spaced(part) if rules.remove_underscore else part for part in parts]
        parts = [rules.replacements.get(comparable(part), part) for part in parts]
        return [part for part in parts if part and comparable(part) not in rules.undesired]

    def tags(self, probabilities: np.ndarray) -> list[str]:
        """The tags of a picture from the probabilities [N] of all tags, each once."""
        rules, categories = self.rules, self.table.categories
        chosen = np.flatnonzero(probabilities >= self._limits).tolist()
        if rules.characters_first:
            chosen.sort(key=lambda index: categories[index] != "character")
        ratings = self.table.of("rating") if rules.rating else ()
        if len(ratings):
            best = int(ratings[probabilities[ratings].argmax()])
            chosen = [best, *chosen] if rules.rating == "first" else [*chosen, best]
        return self.ordered(tag for index in chosen for tag in self._written[index])

    def ordered(self, tags: Iterable[str]) -> list[str]:
        """The tags, each once, those that always stand first before the others."""
        tags = list(dict.fromkeys(tags))
        firsts = [comparable(first) for first in self.rules.always_first]
        front = [tag for first in firsts for tag in tags if comparable(tag) == first]
        return list(dict.fromkeys([*front, *tags]))

    def added(self, existing: str, tags: list[str]) -> list[str]:
        """The tags of a caption, and behind them those that it lacks."""
        mark = self.rules.separator.strip() or self.rules.separator
        old = [tag for tag in map(str.strip, existing.split(mark)) if tag]
        known = set(map(comparable, old))
        return self.ordered([*old, *(tag for tag in tags if comparable(tag) not in known)])
