"""How tags are written. Needs no numpy."""

import re

KAOMOJI = re.compile(r"[^\w\s]*\w?[^\w\s]*_[^\w\s]*\w?[^\w\s]*", re.ASCII)  # ^_^ and (o)_(o), but not long_hair


def comparable(tag: str) -> str:
    """A tag as it is compared: with blanks, whichever way it is written."""
    return tag.replace("_", " ").strip()


def spaced(tag: str) -> str:
    """A tag with blanks instead of underscores, unless it is a face such as ^_^."""
    return tag if KAOMOJI.fullmatch(tag) else tag.replace("_", " ")
