"""Configurations of other tools, read as they are: lora-scripts' TOML, kohya_ss' JSON and TOML. Needs no torch."""

from library.options.config_file import Given
from library.options.fields import Flag
from library.options.imports import kohya_ss, lora_scripts
from library.options.imports.translation import Translation

TOOLS = (lora_scripts, kohya_ss)


def translate(given: dict[str, Given], flags: dict[str, Flag]) -> Translation | None:
    """The file's keys as options of this script; None where no key tells that another tool wrote it."""
    tool = max(TOOLS, key=lambda tool: tool.count_marks(given))
    if not tool.count_marks(given):
        return None
    translation = Translation(tool.NAME, flags, dict(given))
    tool.apply_rules(translation)
    translation.answer(tool.KEYS)
    translation.close_lists()
    return translation
