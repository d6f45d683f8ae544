"""The user's folder for what can be found out again, and small tables of JSON in it."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from library.errors import CannotWrite
from library.files import write_text_whole
from library.texts import read_json

MAX_ENTRIES = 200  # of a table; those written longest ago go


def cache_folder() -> Path:
    """`ATHANOR_CACHE_DIR` where it is set, else `athanor` where this system keeps the caches of a user."""
    if own := os.environ.get("ATHANOR_CACHE_DIR"):
        return Path(own)
    usual = os.environ.get("LOCALAPPDATA") if os.name == "nt" else os.environ.get("XDG_CACHE_HOME")
    return (Path(usual) if usual else Path(os.path.expanduser("~"), ".cache")) / "athanor"


def remembered(table: str) -> dict[str, Any]:
    """What is in a table; nothing where it is not there or broken."""
    with suppress(OSError, ValueError):
        content = read_json((cache_folder() / table).read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
    return {}


def remember(table: str, key: str, value: Any) -> None:
    """Put an entry into a table; where it cannot be written, nothing is kept and nothing said."""
    entries = {name: entry for name, entry in remembered(table).items() if name != key} | {key: value}
    newest = dict(list(entries.items())[-MAX_ENTRIES:])
    with suppress(OSError, CannotWrite):
        write_text_whole(cache_folder() / table, json.dumps(newest, indent=1))
