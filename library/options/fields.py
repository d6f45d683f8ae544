"""How an option is declared, once, as a field of a frozen dataclass, and what a flag knows of its declaration."""

import inspect
import types
import typing
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

REQUIRED: Any = type("Required", (), {"__repr__": lambda self: "REQUIRED"})()  # the default of what must be given

KINDS = {bool: "bool", int: "int", float: "float", str: "str", Path: "path"}


def option(
    default: Any,
    help: str,
    *,
    flag_type: str | None = None,
    choices: tuple | None = None,
    aliases: tuple[str, ...] = (),
    spellings: tuple[str, ...] = (),
    is_positional: bool = False,
    is_secret: bool = False,
) -> Any:
    """A dataclass field that is a flag; its kind comes from the annotation unless `flag_type` names it.

    `spellings` are further flags for it on the command line ("-o"). A positional one is given without its name, and
    must be given where its default is `REQUIRED`. The value of a secret is never written anywhere.
    """
    metadata = {
        "help": help,
        "flag_type": flag_type,
        "choices": choices,
        "aliases": aliases,
        "spellings": spellings,
        "is_positional": is_positional,
        "is_secret": is_secret,
    }
    return field(default=default, repr=not is_secret, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class OptionGroup:
    """What all groups of options share."""

    # option -> "command line" or "FILE:LINE", for those the user set
    sources: dict[str, str] = field(default_factory=dict, repr=False, compare=False)

    def check(self) -> list[str]:
        """Sentences on values of this group that cannot work; each begins with its flag."""
        return []


@dataclass(frozen=True)
class Flag:
    """One option as the command line and a configuration file see it."""

    name: str
    kind: str  # "bool", "int", "float", "int_or_float", "str", "path" or "prompts"
    is_list: bool
    default: Any
    help: str
    choices: tuple | None
    aliases: tuple[str, ...]  # names other tools use for it in configuration files
    spellings: tuple[str, ...]  # further flags for it on the command line
    is_positional: bool
    is_secret: bool  # its value is never written anywhere
    group: type

    @property
    def label(self) -> str:
        """How a sentence names it: --NAME, or the NAME of a positional one."""
        return self.name if self.is_positional else f"--{self.name}"


def flags_of(options_type: type) -> dict[str, Flag]:
    """The flags of an options class by name, group after group in the order of inheritance."""
    declared = {item.name: item for item in fields(options_type) if "help" in item.metadata}
    flags = {}
    for group in options_type.__mro__:
        for name, annotation in inspect.get_annotations(group).items():
            if name in declared and name not in flags:
                flags[name] = _flag(group, annotation, declared[name])
    return flags


def _flag(group: type, annotation: Any, declared: Any) -> Flag:
    kind, is_list = _kind(annotation)
    metadata = declared.metadata
    return Flag(
        name=declared.name,
        kind=metadata["flag_type"] or kind,
        is_list=is_list,
        default=declared.default,
        help=metadata["help"],
        choices=metadata["choices"],
        aliases=metadata["aliases"],
        spellings=metadata["spellings"],
        is_positional=metadata["is_positional"],
        is_secret=metadata["is_secret"],
        group=group,
    )


def _kind(annotation: Any) -> tuple[str, bool]:
    """The kind of value and whether a list of them, e.g. `list[float] | None` -> ("float", True)."""
    members = [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        members = [member for member in typing.get_args(annotation) if member is not type(None)]
    if set(members) == {int, float}:
        return "int_or_float", False
    (member,) = members
    if typing.get_origin(member) is list:
        return KINDS[typing.get_args(member)[0]], True
    return KINDS[member], False
