"""Options from defaults, a configuration file and the command line, in this order; all problems in one error."""

import argparse
import difflib
import logging
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from library.errors import UserError
from library.options.config_file import Given, config_path, read_config, rename_aliases, write_config
from library.options.convert import LISTS_JOINED_BY_COMMA, Mismatch, convert, is_unset
from library.options.fields import REQUIRED, Flag, OptionGroup, flags_of
from library.options.groups import ConfigOptions
from library.options.honoured import refusals_for
from library.options.places import COMMAND_LINE, in_place, subject, with_place
from library.options.recorded import FORMAT, left_out_of_record, options_of_record
from library.secrets import HIDDEN, hide

logger = logging.getLogger(__name__)

META_VARIABLES = {"int": "N", "float": "X", "int_or_float": "N", "str": "TEXT", "path": "PATH", "prompts": "PROMPTS"}
ARGPARSE_MESSAGES = (  # argparse's words -> ours
    (r"^argument (--\w+): expected one argument$", r"\1 needs a value, none was given"),
    (r"^argument (--\w+): ignored explicit argument", r"\1 takes no value, got"),
    (r"^ambiguous option: (\S+) could match (.*)$", r"\1 is short for more than one flag: \2"),
)
NO_KEYS_OF_A_FILE = ("config_file", "output_config")

Options = TypeVar("Options", bound=OptionGroup)


@dataclass
class Reading:
    """What has been read so far, and what was wrong with it."""

    options_type: type[OptionGroup]
    flags: dict[str, Flag]
    values: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)  # options whose value could not be used
    problems: list[str] = field(default_factory=list)
    is_complete: bool = True  # False where a file could not be read, so that nothing is known to be missing

    def add(self, name: str, given: Given) -> None:
        """Take a value over what was there before, or note why it cannot be used."""
        flag = self.flags[name]
        try:
            value = convert(flag, given.value)
        except Mismatch as mismatch:
            self.failed.add(name)
            shown = HIDDEN if flag.is_secret else _shown(given.value)
            self.problems.append(f"{_place(flag, given.source)} must be {mismatch}, got {shown}")
            return
        self.values[name] = value
        self.sources.pop(name, None)
        if not is_unset(given.value):
            self.sources[name] = given.source

    def add_missing(self) -> bool:
        """Note what must be given and was not; True if there is any."""
        missing = [
            flag
            for name, flag in self.flags.items()
            if flag.default is REQUIRED and self.values.get(name) in (None, REQUIRED)
        ]
        self.problems += [f"{flag.label} is needed: {flag.help}" for flag in missing if flag.name not in self.failed]
        return bool(missing)


def read_options(
    options_type: type[Options],
    argv: list[str] | None = None,
    look_further: Callable[[Options], list[str]] | None = None,
) -> Options:
    """The options of a run; a `UserError` names all that is wrong, and --output_config ends the script here.

    Where something is wrong, `look_further` says what else is, so that all comes in one list.
    """
    reading = Reading(options_type, flags_of(options_type))
    command_line = _read_command_line(reading, argv)
    writes_config = "output_config" in command_line
    config_file = command_line.get("config_file")
    if config_file and config_file.value and not writes_config:
        _read_file(reading, config_file.value, "strict_config" in command_line)
    for name, given in command_line.items():
        reading.add(name, given)
    _raise_if_any(reading.problems if reading.add_missing() else [])
    options = options_type(**reading.values, sources=reading.sources)
    if writes_config:
        _raise_if_any(reading.problems + ConfigOptions.check(options))
        _write_and_exit(options, reading.flags)
    if reading.is_complete:
        found = _problems_of_values(options)
        if look_further and (found or reading.problems):
            told = {subject(problem) for problem in found} - {""}
            found += [problem for problem in look_further(options) if subject(problem) not in told]
        reading.problems += in_place((problem for problem in found if subject(problem) not in reading.failed), options)
    _raise_if_any(reading.problems)
    return options


def build_parser(options_type: type) -> argparse.ArgumentParser:
    """A parser that yields what the user wrote, as text, of the options that were given."""
    flags = flags_of(options_type)
    parser = _Parser(description=options_type.__doc__, usage=_usage(flags))
    sections = {}
    for flag in flags.values():
        if flag.group not in sections:
            sections[flag.group] = parser.add_argument_group(_title(flag.group, options_type))
        names = [flag.name] if flag.is_positional else [f"--{flag.name}", *flag.spellings]
        sections[flag.group].add_argument(*names, **_argparse_arguments(flag))
    return parser


def _title(group: type, options_type: type) -> str | None:
    return group.__doc__ if group is not options_type else None  # which is said above already


def _usage(flags: dict[str, Flag]) -> str:
    words = ["%(prog)s", *(flag.name for flag in flags.values() if flag.is_positional)]
    return " ".join([*words, *(["[--config_file PATH]"] if "config_file" in flags else []), "[--FLAG [VALUE ...]] ..."])


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        for pattern, words in ARGPARSE_MESSAGES:
            message = re.sub(pattern, words, message)
        raise UserError(message)


def _argparse_arguments(flag: Flag) -> dict[str, Any]:
    shown_default = "" if flag.default in (None, False, "", REQUIRED) else f" (default: {flag.default})"
    arguments = {"help": (flag.help + shown_default).replace("%", "%%"), "default": argparse.SUPPRESS}
    if flag.kind == "bool":
        return {**arguments, "action": "store_true"}
    choices = "{" + ",".join(str(choice) for choice in flag.choices) + "}" if flag.choices else None
    if flag.is_positional:
        return {**arguments, "nargs": "*" if flag.is_list else "?"}  # what is missing is told with all other problems
    arguments["metavar"] = choices or META_VARIABLES[flag.kind]
    return {**arguments, "action": _GivenOnce, **({"nargs": "*"} if flag.is_list else {})}


class _GivenOnce(argparse.Action):
    """Keeps the last value, and says so where there was another; a second file of options is a mistake."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        before = getattr(namespace, self.dest, values)
        if before != values and self.dest == "config_file":
            parser.error(f"--config_file is given twice, {before} and {values}: one file counts, put all into it")
        if before != values:
            logger.warning("--%s is given twice on the command line: the last one counts", self.dest)
        setattr(namespace, self.dest, values)


def _read_command_line(reading: Reading, words: list[str] | None, source: str = COMMAND_LINE) -> dict[str, Given]:
    """The flags among the words; None stands for those that the script was started with."""
    namespace, rest = build_parser(reading.options_type).parse_known_args(words)
    written = sys.argv[1:] if words is None else words
    reading.problems += [with_place(problem, source) for problem in _problems_of_rest(rest, written, reading.flags)]
    given = {name: Given(value, source) for name, value in vars(namespace).items()}
    return _renamed(given, reading.flags)


def _problems_of_rest(rest: list[str], written: list[str], flags: dict[str, Flag]) -> list[str]:
    """A sentence for each word the parser did not know; words after an unknown flag are its values."""
    problems = []
    for word in rest:
        if word.startswith("-"):
            name = word.partition("=")[0]
            problems.append(f"{name} is not a flag of this script{_nearest(name.lstrip('-'), flags, '--')}")
        elif not problems:
            belongs_to_no_flag = f"{word!r} on the command line belongs to no flag: switches take no value"
            problems.append(_second_value(word, written) or belongs_to_no_flag)
    return problems


def _second_value(word: str, written: list[str]) -> str:
    """What to say of a word behind a flag and its one value; "" where it is no such word."""
    for flag, value, more in zip(written, written[1:], written[2:], strict=False):
        if more == word and flag.startswith("--") and "=" not in flag and not value.startswith("-"):
            is_joined = flag.lstrip("-") in LISTS_JOINED_BY_COMMA
            advice = f"write {value},{more}" if is_joined else "put a text with spaces into quotes"
            return f"{flag} takes one value, got {value!r} and {more!r}: {advice}"
    return ""


def _read_file(reading: Reading, config_file: str, strict: bool) -> None:
    """Take what a file has; one of another tool is translated first, which the log says."""
    from library.options.imports import translate  # a tenth of the time of --help, which needs none

    path = config_path(config_file)
    try:
        given = read_config(path)
        if FORMAT in given:
            given = _read_record(given, reading.flags, path)
        translation = translate(given, reading.flags)
        if translation is not None:
            logger.warning(translation.report(str(path)), extra={"has_lines": True})
            given = translation.options
        given = _renamed(given, reading.flags)
        if translation is not None and translation.command_line is not None:
            given |= _read_inner_command_line(reading, translation.command_line)
    except UserError as error:
        reading.problems += error.problems
        reading.is_complete = False
        return
    unknown = []
    for name, entry in given.items():
        if name in NO_KEYS_OF_A_FILE:
            logger.warning("%s: %s counts on the command line only", entry.source, name)
        elif name in reading.flags:
            reading.add(name, entry)
        else:
            nearest = _nearest(name, reading.flags)
            unknown.append(f"{entry.source}: {name} is not an option of this script{nearest}")
    if strict or reading.values.get("strict_config"):
        reading.problems += unknown
    else:
        for sentence in unknown:
            logger.warning("%s (ignored)", sentence)


def _read_record(given: dict[str, Given], flags: dict[str, Flag], path: Path) -> dict[str, Given]:
    for name in left_out_of_record(given):
        logger.warning("%s: the run was given --%s, which no record keeps; give it again", path, name)
    return options_of_record(given, flags)


def _read_inner_command_line(reading: Reading, words: Given) -> dict[str, Given]:
    """Flags that stand in a file as the words of a command line."""
    try:
        return _read_command_line(reading, words.value, words.source)
    except UserError as error:
        raise UserError(*(with_place(problem, words.source) for problem in error.problems)) from None


def _renamed(given: dict[str, Given], flags: dict[str, Flag]) -> dict[str, Given]:
    renamed, notes = rename_aliases(given, flags)
    for note in notes:
        logger.warning(note)
    for name, entry in renamed.items():
        if name in flags and flags[name].is_secret:
            hide(entry.value)
    return renamed


def _nearest(name: str, flags: dict[str, Flag], prefix: str = "") -> str:
    """ "; did you mean NAME?" for a name that is not known, or nothing."""
    name = name.replace("-", "_")
    aliases = {alias: flag.name for flag in flags.values() for alias in flag.aliases}
    found = [aliases[name]] if name in aliases else difflib.get_close_matches(name, flags, n=1)
    return f"; did you mean {prefix}{found[0]}?" if found else ""


def _place(flag: Flag, source: str) -> str:
    return flag.label if source == COMMAND_LINE else f"{source}: {flag.name}"


def _shown(value: Any) -> str:
    """The value as it would be written in TOML or on the command line."""
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _problems_of_values(options: OptionGroup) -> list[str]:
    """What the groups' checks say."""
    checks = [group.check for group in type(options).__mro__ if "check" in vars(group)]
    return [problem for check in checks for problem in check(options)] + refusals_for(options)


def _raise_if_any(problems: list[str]) -> None:
    if problems:
        raise UserError(*problems)


def _write_and_exit(options: OptionGroup, flags: dict[str, Flag]) -> NoReturn:
    path = config_path(options.config_file)
    write_config(options, flags, path)
    print(f"wrote the options to {path}")
    for name in (name for name, flag in flags.items() if flag.is_secret and getattr(options, name)):
        print(f"--{name} is secret and is not in the file: give it with each run, or log in once")
    raise SystemExit(0)
