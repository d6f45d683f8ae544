"""`--cache_info`: captions and sizes of a folder's pictures in its metadata_cache.json, as kohya keeps them.

Only sizes are taken from it. Names and captions are always read from the folder, which costs little, and the sizes are
compared with the pictures when these are decoded: what has changed is never missed.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from library.dataset.config import Size
from library.files import read_user_text, write_text_whole
from library.leftovers import remove_leftovers
from library.texts import read_json

NAME = "metadata_cache.json"


def read_sizes(folder: Path) -> tuple[dict[str, Size], list[str]]:
    """Name of a picture -> its size as noted, and notes; both empty where there is no such file yet."""
    path = folder / NAME
    if not path.exists():
        return {}, []
    try:
        noted = read_json(read_user_text(path, str(path)))
        return {re.split(r"[/\\]", key)[-1]: _size(entry["resolution"]) for key, entry in noted.items()}, []
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return {}, [f"{path} is damaged and made anew: {error!r}"]


def write_info(folder: Path, pictures: Iterable[tuple[str, str, Size]]) -> list[str]:
    """Note caption and size of a folder's pictures, where they are not noted yet; a note where that is impossible."""
    path = folder / NAME
    remove_leftovers([folder])
    text = json.dumps({picture: {"caption": c, "resolution": list(s)} for picture, c, s in pictures}, indent=1)
    try:
        if not path.is_file() or path.read_bytes() != text.encode():
            write_text_whole(path, text)
    except OSError as error:
        return [f"--cache_info: {path} cannot be written: {error.strerror}"]
    return []


def _size(value: object) -> Size:
    width, height = value
    if not (isinstance(width, int) and isinstance(height, int) and width > 0 and height > 0):
        raise ValueError(f"{value} is no size")
    return width, height
