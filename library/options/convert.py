"""Values as they are written, on the command line or in TOML, made into values of the flag's type."""

import re
import sys
from typing import Any

from library.options.derived import names_prompt_file
from library.options.fields import Flag
from library.texts import is_unicode

LISTS_JOINED_BY_COMMA = ("resolution", "face_crop_aug_range")  # text flags that configurations also write as [w, h]
WRITTEN_FOR_UNSET = {  # what other tools write for the default, or kohya takes for it
    "max_token_length": (75,),
    "dynamo_backend": ("no",),
    "save_n_epoch_ratio": (0,),
    "scale_weight_norms": (0, 0.0),
}
MAX_WHOLE = 10**18
MAX_PATH_BYTES, MAX_NAME_BYTES = 4095, 255  # what Linux takes
SAME_VALUES = {("max_token_length", "255"): 225}  # kohya trains 3 chunks of 75 tokens with either

A_PATH = (
    "a path without control characters (in double quotes TOML reads \\t and \\n as tab and line end: write Windows "
    "paths in single quotes or with /) and without names of more than 255 bytes"
)


class Mismatch(ValueError):
    """A value that its flag cannot take; the message completes "NAME must be ..."."""


def convert(flag: Flag, value: Any) -> Any:
    """The value in the flag's type, its default for "" and []; a `Mismatch` where it does not fit."""
    if is_unset(value) or _is_written_for_unset(flag, value):
        return flag.default
    if flag.is_list:
        items = value if isinstance(value, list) else [value]
        return [_convert_one(flag, item) for item in items if item != ""]
    if flag.name in LISTS_JOINED_BY_COMMA and isinstance(value, list):
        return ",".join(_to_text(item) for item in value)
    return _convert_one(flag, SAME_VALUES.get((flag.name, str(value)), value))


def is_unset(value: Any) -> bool:
    """Whether a value is a way to write "not given"."""
    return value in ("", [], [""])


def _is_written_for_unset(flag: Flag, value: Any) -> bool:
    return any(str(value) == str(unset) for unset in WRITTEN_FOR_UNSET.get(flag.name, ()))


def _convert_one(flag: Flag, value: Any) -> Any:
    converted = CONVERTERS[flag.kind](value)
    if flag.choices and converted not in flag.choices:
        raise Mismatch(f"one of {', '.join(str(choice) for choice in flag.choices)}")
    return converted


def _to_bool(value: Any) -> bool:
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if isinstance(value, int) and value in (0, 1):
        return bool(value)
    raise Mismatch("true or false")


def _to_int(value: Any) -> int:
    number = _number(value)
    if number is None or number != int(number):
        raise Mismatch("a whole number")
    if abs(number) > MAX_WHOLE:
        raise Mismatch(f"a whole number of at most {MAX_WHOLE}")
    return int(number)


def _to_float(value: Any) -> int | float:
    """A number; a TOML integer stays one, because it decides the saved type of alpha."""
    number = _number(value)
    if number is None:
        raise Mismatch("a number")
    return float(number) if isinstance(value, str) else number


def _to_int_or_float(value: Any) -> int | float:
    """A count of steps, or a share of all steps: "10%" and 0.1 are the same."""
    if isinstance(value, str) and value.endswith("%"):
        share = _number(value[:-1])
        number = None if share is None else share / 100
    else:
        number = _number(value)
        if isinstance(number, float) and number >= 1:
            number = None
    if number is None:
        raise Mismatch("a whole number of steps, or a share of all steps below 1 or in percent (0.1 or 10%)")
    return number


def _number(value: Any) -> int | float | None:
    """A finite number, an int where it is written as one; None for anything else."""
    if isinstance(value, str):
        try:
            value = int(value)
        except ValueError:
            try:
                value = float(value)
            except ValueError:
                return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and abs(value) <= sys.float_info.max else None


def _to_text(value: Any) -> str:
    if isinstance(value, str):
        if not is_unicode(value):
            raise Mismatch("text in UTF-8")
        return value
    number = _number(value)
    if number is None:
        raise Mismatch("text in quotes")
    return str(number)


def _to_path(value: Any) -> str:
    text = _to_text(value)
    if not is_path(text):
        raise Mismatch(A_PATH)
    return text


def is_path(text: str) -> bool:
    """Whether a text may be a path: one with control characters is a Windows path in the wrong quotes."""
    if not is_unicode(text) or len(text.encode()) > MAX_PATH_BYTES:
        return False
    has_long_names = any(len(name.encode()) > MAX_NAME_BYTES for name in re.split(r"[/\\]", text))
    return not has_long_names and all(ord(character) >= 32 for character in text)


def _to_prompts(value: Any) -> str:
    """The path of a file of prompts, or prompts, which may be lines of text."""
    text = _to_text(value)
    return _to_path(text) if names_prompt_file(text) else text


CONVERTERS = {
    "bool": _to_bool,
    "int": _to_int,
    "float": _to_float,
    "int_or_float": _to_int_or_float,
    "str": _to_text,
    "path": _to_path,
    "prompts": _to_prompts,
}
