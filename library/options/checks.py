"""Helpers for the checks of option groups: each returns sentences, one a problem."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from library.errors import UserError


def at_least(options: Any, minimum: float, *names: str) -> list[str]:
    """A sentence for each given option below the minimum."""
    return [
        f"--{name} must be at least {minimum}, got {getattr(options, name)}"
        for name in names
        if getattr(options, name) is not None and getattr(options, name) < minimum
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
    return [] if not path or Path(path).is_file() else [f"--{name}: there is no file {path}"]


def existing_dir(name: str, path: str | None) -> list[str]:
    """A sentence where the given path is not a folder."""
    return [] if not path or Path(path).is_dir() else [f"--{name}: there is no folder {path}"]


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
