"""Sheets of pictures as PNG files, one or as many as are needed."""

import logging
from collections.abc import Sequence
from pathlib import Path

from library.panels import Layout, Panel, draw_panels
from library.pictures import note_on_missing, write_picture

logger = logging.getLogger(__name__)


def write_sheets(panels: Sequence[Panel], title: str, path: Path, layout: Layout) -> list[Path]:
    """Draw panels into one PNG file, or into several, NAME-000001.png and so on, and say where they are."""
    sheets, missing = draw_panels(panels, title, layout)
    if missing:
        logger.warning(note_on_missing(missing))
    sheets = list(sheets)
    paths = [path]
    if len(sheets) > 1:
        paths = [path.with_name(f"{path.stem}-{number:06d}.png") for number in range(1, len(sheets) + 1)]
    for place, sheet in zip(paths, sheets, strict=True):
        write_picture(place, sheet)
    logger.info("sheet: %s", path if len(paths) == 1 else f"{paths[0]} to {paths[-1].name}")
    return paths
