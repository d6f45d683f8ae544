"""Captions and tags put in order: spelling, duplicates, synonyms, what one tag says of several people, fixed traits."""

import fnmatch
import re
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from library.captioning.spelling import spaced
from library.errors import UserError
from library.files import read_user_text
from library.options.config_file import parse_toml

RATING = re.compile(r"rating[: ].*", re.IGNORECASE)
SEVERAL = re.compile(r".*(girls|boys)")  # 2girls, multiple boys
LENGTH = re.compile(r"(long|medium|short) hair")
# Of several people, more than one tag of a row tells nothing of either of them.
TRAITS = (
    LENGTH,
    re.compile(r"[\w-]+ eyes"),
    re.compile(r"[\w-]+ sleeves|sleeveless"),
    re.compile(r"ponytail|ahoge|twintails|two side up|sidelocks|([\w-]+ )*(braids?|(hair |side )?buns?)"),
    re.compile(r"(?!(?:long|medium|short) hair)[\w-]+ hair"),
)
DRAWN = re.compile(r"\b(anime|cartoon)\s+(?=(girl|boy|woman|women|man|men|lady|female|male|character)s?\b)", re.I)
DOUBLED = re.compile(r"\b(\w+)(\s+\1\b)+", re.IGNORECASE)
QUOTED = r"(\"[^\"]*\"|'[^']*'|[\w-]+)"
LETTERING = re.compile(
    rf"\s*\b((and|with|has|that has)\s+)?(a\s+sign\s+)?"
    rf"(that\s+says?\s+{QUOTED}|(the|a)\s+(words?|letters?|names?|numbers?)\s+{QUOTED})"
    r"(\s+(written\s+)?(on|in)\s+((it|the|her|his|their|him)\b\s*)?([\w-]+)?)?",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Rules:
    """How captions are cleaned; the fields are the keys of a rules file."""

    separator: str = ","
    underscores_to_blanks: bool = True
    lowercase: bool = False
    drop: list[str] = field(default_factory=list)  # tags; * stands for any text
    keep: list[str] = field(default_factory=list)  # tags that `drop` leaves
    synonyms: dict[str, str] = field(default_factory=dict)  # tag -> tag
    phrases: dict[str, str] = field(default_factory=dict)  # text anywhere in a caption -> text
    first: list[str] = field(default_factory=list)  # tags that stand first, in this order
    add: list[str] = field(default_factory=list)  # tags that every caption gets, at its start
    sort: bool = False  # the tags behind those by the alphabet
    drop_ratings: bool = True
    drop_covered: bool = True  # "shirt" beside "white shirt"
    drop_traits_of_several: bool = True  # hair and eyes of several colours beside "2girls"

    @cached_property
    def first_places(self) -> dict[str, int]:
        return {key(tag): place for place, tag in enumerate([*self.add, *self.first])}

    @cached_property
    def synonym_of(self) -> dict[str, str]:
        return {key(tag): other for tag, other in self.synonyms.items()}

    @cached_property
    def unwanted(self) -> list[re.Pattern]:
        return [_pattern(tag) for tag in self.drop]

    @cached_property
    def wanted(self) -> list[re.Pattern]:
        return [_pattern(tag) for tag in self.keep]


def read_rules(path: Path) -> Rules:
    """The rules of a TOML file; UserError for keys that are not known and values of another kind."""
    given = parse_toml(f"--rules: {path}", read_user_text(path, f"--rules: {path}"))
    known = {item.name: item for item in fields(Rules)}
    default = Rules()
    problems = []
    for name, value in given.items():
        if name not in known:
            problems.append(f"--rules: {path}: there is no rule {name}; known are {', '.join(known)}")
        elif fault := _fault(value, getattr(default, name)):
            problems.append(f"--rules: {path}: {name} must be {fault}, got {value!r}")
    if problems:
        raise UserError(*problems)
    return Rules(**given)


def _fault(value: Any, default: Any) -> str | None:
    """What a rule of this default must be, where the value is something else."""
    if isinstance(default, list):
        return None if isinstance(value, list) and all(isinstance(v, str) for v in value) else "a list of texts"
    if isinstance(default, dict):
        is_right = isinstance(value, dict) and all(isinstance(v, str) for v in value.values())
        return None if is_right else 'a table of texts such as "old" = "new"'
    if isinstance(default, str):
        return None if isinstance(value, str) and value.strip() else "a text"
    return None if isinstance(value, bool) else "true or false"


def key(tag: str) -> str:
    """A tag as it is compared: faces by their letters' case too, such as :d and :D."""
    text = " ".join(tag.replace("_", " ").split())
    return text.casefold() if re.search(r"\w\w", text) else text


def _pattern(tag: str) -> re.Pattern:
    return re.compile(fnmatch.translate(key(tag).replace("[", "[[]").replace("?", "[?]")))


def clean_tags(text: str, rules: Rules) -> str:
    """One line of tags, cleaned."""
    for old, new in rules.phrases.items():
        text = text.replace(old, new)
    tags = [" ".join(tag.split()) for tag in text.split(rules.separator)]
    if rules.underscores_to_blanks:
        tags = [spaced(tag) for tag in tags]
    if rules.lowercase:
        tags = [tag.lower() if re.search(r"\w\w", tag) else tag for tag in tags]
    tags = [rules.synonym_of.get(key(tag), tag) for tag in tags]
    if rules.drop_ratings:
        tags = [tag for tag in tags if not RATING.fullmatch(tag)]
    tags = [tag for tag in tags if not _matches(rules.unwanted, tag) or _matches(rules.wanted, tag)]
    tags = each_once([*rules.add, *tags])
    if rules.drop_traits_of_several and any(SEVERAL.fullmatch(key(tag)) for tag in tags):
        tags = without_traits_of_several(tags)
    if rules.drop_covered:
        tags = without_covered(tags)
    blank = " " if rules.separator.isascii() else ""
    return f"{rules.separator}{blank}".join(_ordered(tags, rules))


def each_once(tags: list[str]) -> list[str]:
    """The tags without empty ones and repetitions."""
    first: dict[str, str] = {}
    for tag in filter(None, tags):
        first.setdefault(key(tag), tag)
    return list(first.values())


def without_traits_of_several(tags: list[str]) -> list[str]:
    """The tags without traits of which there is more than one of a kind."""
    for pattern in TRAITS:
        found = [tag for tag in tags if pattern.fullmatch(key(tag))]
        if len(found) > 1:
            tags = [tag for tag in tags if tag not in found]
    return tags


def without_covered(tags: list[str]) -> list[str]:
    """The tags without those of one word, or "hair ornament", with which a longer one ends."""
    endings = {" ".join(words[n:]) for tag in tags for words in [key(tag).split()] for n in range(1, len(words))}
    return [tag for tag in tags if key(tag) not in endings or (" " in key(tag) and key(tag) != "hair ornament")]


def clean_sentence(text: str) -> str:
    """A caption in words, without "anime" before a person, words said twice and blanks too many."""
    text = DRAWN.sub("", " ".join(text.split()))
    return DOUBLED.sub(r"\1", text).strip()


def without_lettering(caption: str) -> str:
    """A caption without what it says of words, names and numbers in the picture, which models often make up."""
    return " ".join(LETTERING.sub("", caption).split()).strip()


def clean_text(text: str, rules: Rules) -> str:
    """A caption of one or more lines, cleaned line by line."""
    return "\n".join(clean_tags(line, rules) for line in text.splitlines() if line.strip())


def _matches(patterns: list[re.Pattern], tag: str) -> bool:
    return any(pattern.fullmatch(key(tag)) for pattern in patterns)


def _ordered(tags: list[str], rules: Rules) -> list[str]:
    places = rules.first_places
    return sorted(tags, key=lambda tag: (places.get(key(tag), len(places)), key(tag) if rules.sort else ""))
