"""Flags that the scripts share which make pictures of pictures."""

from dataclasses import dataclass
from typing import Any

from library.options.checks import at_least, at_most
from library.options.fields import OptionGroup, option

FORMATS = ("same", "png", "jpg", "webp")


@dataclass(frozen=True, kw_only=True)
class WritingOptions(OptionGroup):
    """Files that are written"""

    format: str = option("same", "format of the pictures; what is no PNG, JPEG or WebP becomes PNG", choices=FORMATS)
    quality: int = option(95, "quality of JPEG and WebP files, from 1 to 100")
    overwrite: bool = option(False, "make again what is there already")

    def check(self) -> list[str]:
        return check_quality(self)


def check_quality(options: Any) -> list[str]:
    """Whether --quality is one."""
    return at_least(options, 1, "quality") + at_most(options, 100, "quality")


def check_sheet(path: str | None, label: str = "--sheet") -> list[str]:
    """Whether the path of a sheet is that of a PNG file."""
    if path is None or path.lower().endswith(".png"):
        return []
    return [f"{label} must be a .png file, got {path}"]
