"""What becomes of the keys of another tool's file: the rows of its table, and what they made of one file."""

from dataclasses import dataclass, field
from typing import Any

from library.options.config_file import Given
from library.options.fields import Flag

NOT_SET = "empty or off"
OTHER_MODELS = "for other models than Stable Diffusion 1.x, 2.x and XL"
OFF = ("", None, False, [])  # 0 equals False


@dataclass(frozen=True)
class Renamed:
    """A flag under another name."""

    name: str


@dataclass(frozen=True)
class Argument:
    """An item NAME=VALUE of a flag that takes a list of them."""

    flag: str
    name: str


@dataclass(frozen=True)
class Special:
    """Read by the tool's own rules; the words say what becomes of it."""

    words: str


@dataclass(frozen=True)
class LeftOut:
    """Without meaning here, and why."""

    reason: str


Answer = Renamed | Argument | Special | LeftOut


@dataclass
class Translation:
    """A file of another tool: what is still to be read of it, and what has become of the rest."""

    tool: str
    flags: dict[str, Flag]
    given: dict[str, Given]
    options: dict[str, Given] = field(default_factory=dict)
    command_line: Given | None = None  # words of a command line that go before the file's keys
    changes: list[str] = field(default_factory=list)  # "KEY = VALUE -> OPTION = VALUE"
    left_out: dict[str, list[str]] = field(default_factory=dict)  # reason -> keys
    items: dict[str, dict[str, Given]] = field(default_factory=dict)  # list flag -> name -> NAME=VALUE
    item_keys: dict[str, list[str]] = field(default_factory=dict)  # list flag -> keys that gave the items

    def value(self, key: str, default: Any = None) -> Any:
        """What the file has for a key."""
        return self.given[key].value if key in self.given else default

    def is_on(self, key: str) -> bool:
        """Whether a switch is set, which some tools write as text."""
        return str(self.value(key)).lower() in ("true", "1")

    def number(self, key: str) -> float:
        """The number of a key, 0 where there is none."""
        try:
            return float(self.value(key) or 0)
        except (TypeError, ValueError):
            return 0.0

    def leave_out(self, key: str, reason: str) -> None:
        """Take the key away, if it is there, without using it; one that is off needs no reason."""
        entry = self.given.pop(key, None)
        if entry is not None:
            self.left_out.setdefault(NOT_SET if entry.value in OFF else reason, []).append(key)

    def become(self, key: str, name: str, value: Any) -> None:
        """Take the key away and set an option instead, over what the file has for it."""
        entry = self.given.pop(key)
        self.given.pop(name, None)
        self.options[name] = Given(value, entry.source)
        self.changes.append(f"{key} = {shown(entry.value)} -> {name} = {shown(value)}")

    def add_item(self, flag: str, item: str, key: str, source: str) -> None:
        """Add NAME=VALUE, which a key stands for, to a flag that takes a list; the last of one name counts."""
        self.items.setdefault(flag, {})[_name(item)] = Given(item, source)
        keys = self.item_keys.setdefault(flag, [])
        keys += [key] if key not in keys else []

    def add_argument(self, key: str, flag: str, name: str) -> None:
        """Take the key away and add its value as NAME=VALUE, unless it is empty or switched off."""
        entry = self.given[key]
        if entry.value is False or entry.value in ("", None, []):
            self.leave_out(key, NOT_SET)
        else:
            del self.given[key]
            self.add_item(flag, f"{name}={compact(entry.value)}", key, entry.source)

    def answer(self, table: dict[str, Answer]) -> None:
        """Read what the tool's own rules have left; flags and unknown keys stay what they are."""
        for key, entry in list(self.given.items()):
            match None if key in self.flags else table.get(key):
                case Renamed(name) if name in self.given or name in self.options:
                    self.leave_out(key, f"{name} is given too")
                case Renamed(name):
                    self.become(key, name, entry.value)
                case Argument(flag, name):
                    self.add_argument(key, flag, name)
                case LeftOut(reason):
                    self.leave_out(key, reason)
                case Special() if entry.value in OFF:
                    self.leave_out(key, NOT_SET)
                case _:
                    self.options[key] = self.given.pop(key)

    def close_lists(self) -> None:
        """Set the flags whose items were collected; what the file itself lists goes before what keys stand for."""
        for flag, items in self.items.items():
            own = self.options.get(flag)
            listed = {_name(item): item for item in as_list(own.value)} if own else {}
            made = [entry.value for name, entry in items.items() if name not in listed]
            self.changes.append(f"{', '.join(self.item_keys[flag])} -> {flag} {' '.join(made)}")
            self.options[flag] = Given([*made, *listed.values()], next(iter(items.values())).source)

    def report(self, path: str) -> str:
        """What was done, for the user to read."""
        lines = [f"{path} is read as a configuration of {self.tool}:", *self.changes]
        lines += [f"left out: {', '.join(keys)} ({why})" for why, keys in self.left_out.items() if why != NOT_SET]
        if off := self.left_out.get(NOT_SET):
            lines.append(f"{NOT_SET}: {len(off)} more")
        return "\n  ".join(lines)


def as_list(value: Any) -> list:
    """A list as it is, the lines of a text, nothing for an empty value."""
    if isinstance(value, str):
        return [line.strip() for line in value.splitlines() if line.strip()]
    return list(value) if isinstance(value, list) else []


def _name(item: str) -> str:
    return str(item).partition("=")[0].strip()


def compact(value: Any) -> str:
    """A value inside NAME=VALUE: no spaces and quotes."""
    return "".join(str(value).replace('"', "").split())


def shown(value: Any) -> str:
    """A value in a line of the report, cut where it is long."""
    text = str(value).lower() if isinstance(value, bool) else " ".join(str(value).split())
    return f"{text[:57]}..." if len(text) > 60 else text
