"""Helpers for the checks of option groups: each returns sentences, one a problem."""

import os
import re
from collections.abc import Callable
from typing import Any

from library.errors import UserError

MAX_NAME_BYTES = 180  # of the 255 that a file's name may have: what is added to it needs room
WINDOWS_DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d) *(\.|$)", re.IGNORECASE)


def at_least(options: Any, minimum: float, *names: str) -> list[str]:
    """A sentence for each given option below the minimum."""
    return [
        f"--{name} must be at least {minimum}, got {getattr(options, name)}"
        for name in names
        if getattr(options, name) is not None and getattr(options, name) < minimum
    ]


def at_most(options: Any, maximum: float, *names: str) -> list[str]:
    """A sentence for each given option above the maximum."""
    return [
        f"--{name} must be at most {maximum}, got {getattr(options, name)}"
        for name in names
        if getattr(options, name) is not None and getattr(options, name) > maximum
    ]


def above_zero(options: Any, *names: str) -> list[str]:
    """A sentence for each given option that is not above 0."""
    return [
        f"--{name} must be above 0, got {getattr(options, name)}"
        for name in names
        if getattr(options, name) is not None and getattr(options, name) <= 0
    ]


def rates(options: Any, *names: str) -> list[str]:
    """A sentence for each given probability outside [0, 1)."""
    return [
        f"--{name} must be at least 0 and below 1, got {getattr(options, name)}"
        for name in names
        if getattr(options, name) is not None and not 0 <= getattr(options, name) < 1
    ]


def shares(options: Any, *names: str) -> list[str]:
    """A sentence for each given share outside [0, 1]."""
    return [
        f"--{name} must be a share from 0 to 1, got {getattr(options, name)}"
        for name in names
        if not 0 <= getattr(options, name) <= 1
    ]


def caption_numbers(options: Any) -> list[str]:
    """Sentences on numbers that say how captions are used, in flags or in a subset of --dataset_config."""
    return [
        *at_least(options, 0, "keep_tokens", "token_warmup_min", "token_warmup_step"),
        *at_least(options, 0, "caption_dropout_every_n_epochs"),
        *shares(options, "caption_dropout_rate", "caption_tag_dropout_rate"),
    ]


def existing_file(name: str, path: str | None) -> list[str]:
    """A sentence where the given path is not a file."""
    return [] if not path or os.path.isfile(path) else [f"--{name}: there is no file {path}"]


def existing_dir(name: str, path: str | None) -> list[str]:
    """A sentence where the given path is not a folder."""
    return [] if not path or os.path.isdir(path) else [f"--{name}: there is no folder {path}"]


def file_name(name: str, text: str | None, where: str) -> list[str]:
    """A sentence where the given text cannot be the start of a file's name, on this system or on Windows."""
    if not text:
        return []
    if "/" in text or "\\" in text:
        return [f"--{name} must be a name without folders, got {text!r}: see --{where}"]
    if any(ord(character) < 32 for character in text):
        return [f"--{name} must be a name without control characters such as line ends, got {text!r}"]
    if len(text.encode()) > MAX_NAME_BYTES:
        return [f"--{name} must be a name of at most {MAX_NAME_BYTES} bytes in UTF-8, got {len(text.encode())}"]
    if WINDOWS_DEVICE.match(text):
        return [f"--{name} must be a name that Windows takes too, got {text!r}, which is a device there"]
    if os.name == "nt" and (marks := set(text) & set('<>:"|?*')):
        return [f"--{name} must be a name without {' '.join(sorted(marks))}, which Windows does not take, got {text!r}"]
    return []


def name_below(name: str, text: str | None, where: str) -> list[str]:
    """A sentence where the given text, put behind a folder, does not stay in it."""
    parts = re.split(r"[/\\]", text or "")
    if text and (".." in parts or not parts[0] or os.path.isabs(text) or not text.isprintable()):
        return [f"--{name} must be a name, or a path below --{where}, got {text!r}"]
    return []


def conflict(options: Any, first: str, second: str, advice: str) -> list[str]:
    """A sentence where both options are set."""
    both = getattr(options, first) and getattr(options, second)
    return [f"--{first} does not go with --{second}: {advice}"] if both else []


def problems_of(function: Callable[..., Any], *arguments: Any) -> list[str]:
    """The problems that a function raises as a `UserError`."""
    try:
        function(*arguments)
    except UserError as error:
        return error.problems
    return []
