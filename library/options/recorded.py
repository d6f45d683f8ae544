"""The options in the record of a run: how they are written, and read again by --config_file."""

import os
from pathlib import Path
from typing import Any

from library.options.config_file import NEVER_WRITTEN, Given
from library.options.derived import names_prompt_file
from library.options.fields import Flag, OptionGroup, flags_of

FORMAT = "athanor_run"  # a key that only records have; its value is the version of their form
DRAWN = "drawn by the run"
NOT_REPEATED = ("resume", "resume_from_huggingface")  # a run that is repeated begins at the beginning
OUTPUTS = ("output_dir", "logging_dir", "console_log_file")


def recorded_options(options: OptionGroup, drawn: dict[str, Any]) -> dict[str, Any]:
    """All options and where they came from; `drawn` are those that the run has chosen itself.

    What nobody gave stands apart from the rest, and is written because defaults may change one day. The keys of the
    tables are those of flags, so "options" has to be the last in its file: `read_config` takes a key's last line.
    """
    flags = [flag for flag in flags_of(type(options)).values() if flag.name not in (*NEVER_WRITTEN, *NOT_REPEATED)]
    values = {flag.name: getattr(options, flag.name) for flag in flags if not flag.is_secret} | drawn
    written = {name: str(v) if isinstance(v, Path) else v for name, v in values.items() if v is not None}
    sources = {name: source for name, source in options.sources.items() if name in written}
    sources |= dict.fromkeys(drawn, DRAWN)
    is_default = {flag.name for flag in flags if flag.name not in sources and values.get(flag.name) == flag.default}
    return {
        "working_dir": os.getcwd(),
        "secrets_left_out": [flag.name for flag in flags if flag.is_secret and getattr(options, flag.name)],
        "sources": sources,
        "defaults": {name: value for name, value in written.items() if name in is_default},
        "options": {name: value for name, value in written.items() if name not in is_default},
    }


def options_of_record(given: dict[str, Given], flags: dict[str, Flag]) -> dict[str, Given]:
    """What the run was told, of all that is in its record; defaults that are the same today count as not given."""
    folder = given["working_dir"].value if "working_dir" in given else ""
    return {
        name: Given(_found(flags.get(name), entry.value, folder), entry.source)
        for name, entry in given.items()
        if entry.table == "options"
        or (entry.table == "defaults" and not (name in flags and entry.value == flags[name].default))
    }


def left_out_of_record(given: dict[str, Given]) -> list[str]:
    """The secrets that the run was given and that have to be given again."""
    names = given["secrets_left_out"].value if "secrets_left_out" in given else []
    return [str(name) for name in names] if isinstance(names, list) else []


def _found(flag: Flag | None, value: Any, folder: Any) -> Any:
    """Files to read that are not here are looked for where the run was started; all else stays as it is."""
    if isinstance(value, list):
        return [_found(flag, item, folder) for item in value]
    if flag is None or not (isinstance(value, str) and isinstance(folder, str)):
        return value
    is_path = flag.kind == "path" and flag.name not in OUTPUTS
    if not (is_path or (flag.kind == "prompts" and names_prompt_file(value))) or os.path.exists(value):
        return value
    there = os.path.join(folder, value)
    return there if os.path.exists(there) else value
