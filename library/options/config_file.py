"""Options in TOML and JSON files: where each key stands, what it is called here, and how a file is written."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import toml

from library.errors import CannotWrite, UserError
from library.files import read_user_text, write_text_whole
from library.leftovers import remove_leftovers
from library.options.fields import Flag
from library.secrets import hide_in_text
from library.texts import read_json

KEY_LINE = re.compile(r"""\s*(?:[\w-]+\s*\.\s*)?(["']?)([\w-]+)\1\s*=""")
JSON_KEY = re.compile(r'"([\w-]+)"\s*:')
BACKSLASH_IN_DOUBLE_QUOTES = re.compile(r'"[^"]*\\[^"]*"')
NEVER_WRITTEN = ("config_file", "output_config")  # beside secrets
REASONS = (  # the parser's words -> ours
    (
        r"(?:invalid literal for int|could not convert string to float).*?: (.*)",
        r"\1 is not a value; text needs quotes, a list brackets",
    ),
    (
        r"Invalid date or number.*|This float doesn't have.*",
        "a value that is neither text in quotes, a number, true nor false",
    ),
    (r"What\? (\S+) already exists\?.*", r"[\1] stands twice; put both into one"),
    (r"Not a homogeneous array.*", "a list of mixed types; beside 0.1 write 0.0 for 0 and 1.0 for 1"),
)
MAX_TOML_LENGTH = 1_000_000  # the parser's time for a string of escapes grows with the square of its length
ALIASES_THAT_YIELD = {"epoch": "max_train_steps"}  # tools that write both have computed the steps from the epochs


@dataclass(frozen=True)
class Given:
    """A value as the user wrote it, and where."""

    value: Any
    source: str  # "command line" or "FILE:LINE"
    table: str = ""  # of the file it stands in


def config_path(config_file: str) -> Path:
    """The path of a configuration; ".toml" is added where neither this ending nor ".json" is there."""
    has_ending = config_file.endswith(".toml") or is_json(config_file)
    return Path(config_file if has_ending else f"{config_file}.toml")


def is_json(config_file: str) -> bool:
    """Whether a configuration is JSON by its name."""
    return config_file.lower().endswith(".json")


def read_config(path: Path) -> dict[str, Given]:
    """All keys of a file; one level of tables is flattened, and of keys that are there twice the last counts."""
    text = _read_text(path)
    parse, lines_of_keys = (parse_json, _lines_of_json_keys) if is_json(path.name) else (parse_toml, _lines_of_keys)
    lines = lines_of_keys(text)
    given = {}
    for key, value in parse(path, text).items():
        table, entries = (key, value) if isinstance(value, dict) else ("", {key: value})
        for name, entry in entries.items():
            given[name] = Given(entry, f"{path}:{lines[name]}" if name in lines else str(path), table)
    return given


def _read_text(path: Path) -> str:
    if not os.path.exists(path):
        raise UserError(f"--config_file: there is no file {path}")
    return read_user_text(path, str(path))


def parse_json(path: Path, text: str) -> dict[str, Any]:
    """The keys of an object; null is "not given"."""
    try:
        values = read_json(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: a configuration in JSON is an object, {{...}}")
    return {key: value for key, value in values.items() if value is not None}


def parse_toml(path: Path | str, text: str) -> dict[str, Any]:
    """The tables of a text; what is wrong is said with the path and the line."""
    if len(text) > MAX_TOML_LENGTH:
        raise UserError(f"{path} has {len(text)} characters; a TOML file may have {MAX_TOML_LENGTH}, a JSON file more")
    try:
        values = toml.loads(text)
    except Exception as error:  # the parser raises IndexError, TypeError and more for some broken files
        hide_in_text(text)  # the parser's words quote it
        line = getattr(error, "lineno", None)
        place = f"{path}:{line}" if line else str(path)
        reason = _plain_reason(error.msg) if isinstance(error, toml.TomlDecodeError) else "quotes or brackets are open"
        reason = _named_twice(text, line) if reason == "Duplicate keys!" else reason
        raise UserError(f"{place}: not valid TOML: {reason}{_backslash_hint(text, line)}") from None
    if _ends_in_open_list(text):
        raise UserError(f"{path}: not valid TOML: the last list is not closed with ]")
    return values


def _ends_in_open_list(text: str) -> bool:
    """Whether a list is open at the end, which the parser closes by cutting off the last character."""
    try:
        return "end-of-file" not in toml.loads(f"{text}\n[end-of-file]\n")
    except Exception:
        return True


def _plain_reason(message: str) -> str:
    """The parser's message in words for someone who has not written it."""
    for pattern, words in REASONS:
        message = re.sub(pattern, words, message)
    return message.strip().rstrip(".")


def _named_twice(text: str, line: int) -> str:
    """Which key stands on a line for the second time, and where it stands before."""
    lines = text.split("\n")
    if not (found := KEY_LINE.match(lines[line - 1])):
        return "a key stands twice"
    matches = ((number, KEY_LINE.match(before)) for number, before in enumerate(lines[: line - 1], start=1))
    earlier = [number for number, match in matches if match and match[2] == found[2]]
    return f"{found[2]} stands twice, first on line {earlier[-1]}" if earlier else f"{found[2]} stands twice"


def _backslash_hint(text: str, line: int | None) -> str:
    lines = text.split("\n")
    suspects = lines[line - 1 : line] if line else lines
    if any(BACKSLASH_IN_DOUBLE_QUOTES.search(suspect) for suspect in suspects):
        return r"; write Windows paths in single quotes ('C:\pictures') or with / (" + '"C:/pictures")'
    return ""


def _lines_of_keys(text: str) -> dict[str, int]:
    """The line, from 1, on which each key stands last."""
    matches = ((number, KEY_LINE.match(line)) for number, line in enumerate(text.split("\n"), start=1))
    return {match[2]: number for number, match in matches if match}


def _lines_of_json_keys(text: str) -> dict[str, int]:
    lines = enumerate(text.split("\n"), start=1)
    return {name: number for number, line in lines for name in JSON_KEY.findall(line)}


def rename_aliases(given: dict[str, Given], flags: dict[str, Flag]) -> tuple[dict[str, Given], list[str]]:
    """The same values under the flags' own names, and a line to show for each other name in use."""
    names = {alias: flag.name for flag in flags.values() for alias in flag.aliases}
    renamed = {name: entry for name, entry in given.items() if name not in names}
    notes = []
    for alias in [name for name in given if name in names]:
        stronger = [name for name in (names[alias], ALIASES_THAT_YIELD.get(alias)) if name in renamed]
        if stronger:
            notes.append(f"{given[alias].source}: {alias} is ignored, {stronger[0]} is given too")
        else:
            notes.append(f"{given[alias].source}: {alias} is read as {names[alias]}")
            renamed[names[alias]] = given[alias]
    return renamed, notes


def write_config(options: Any, flags: dict[str, Flag], path: Path) -> None:
    """Write what differs from the defaults, but no secrets; an existing file is left alone."""
    remove_leftovers([path.parent])
    if path.exists():
        raise UserError(f"--output_config does not overwrite: {path} is there already")
    written = [name for name, flag in flags.items() if not flag.is_secret and name not in NEVER_WRITTEN]
    values = {name: getattr(options, name) for name in written}
    lines = [f"{name} = {_to_toml(value)}\n" for name, value in values.items() if value != flags[name].default]
    try:
        write_text_whole(path, "".join(lines))
    except CannotWrite as error:
        raise UserError(f"--output_config: {error}") from None


def _to_toml(value: Any) -> str:
    """A value in TOML, whose strings, numbers, truth values and lists are JSON's."""
    return json.dumps(str(value) if isinstance(value, Path) else value, ensure_ascii=False)
