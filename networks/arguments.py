"""`--network_args`: key=value strings read as what an algorithm declares. Needs no torch."""

import difflib
from collections.abc import Callable

from library.errors import UserError


def truth(text: str) -> bool:
    """True or False, in the usual spellings."""
    known = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in known:
        raise ValueError("True or False")
    return known[text.lower()]


def one_of(*names: str) -> Callable[[str], str]:
    """A reader of one of these names."""

    def read(text: str) -> str:
        if text not in names:
            raise ValueError(" or ".join(names))
        return text

    return read


def read_arguments(module: str, declared: dict[str, Callable[[str], object]], given: dict[str, str]) -> dict:
    """The values given, converted; UserError naming every unknown key and every value that does not fit."""
    values, problems = {}, []
    for key, text in given.items():
        if key not in declared:
            near = difflib.get_close_matches(key, declared, 1)
            hint = f"did you mean {near[0]}?" if near else f"it takes {', '.join(declared)}"
            problems.append(f"--network_args: {module} has no argument {key}; {hint}")
            continue
        if text in (None, "", "None"):
            continue
        try:
            values[key] = declared[key](text)
        except ValueError as error:  # of our own converters it says what they take
            expected = declared[key].__name__ if isinstance(declared[key], type) else error
            problems.append(f"--network_args: {key} must be {expected}, got {text!r}")
    if problems:
        raise UserError(*problems)
    return values
