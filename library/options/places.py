"""Sentences about options, with the place where a file has given the option."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from library.errors import UserError
from library.options.fields import OptionGroup

COMMAND_LINE = "command line"


def subject(sentence: str) -> str:
    """The option that a sentence begins with, as --NAME."""
    match = re.match(r"--(\w+)", sentence)
    return match[1] if match else ""


def in_place(sentences: Iterable[str], options: OptionGroup) -> list[str]:
    """The same sentences; one on an option of a file says where it stands."""
    return [with_place(sentence, options.sources.get(subject(sentence), COMMAND_LINE)) for sentence in sentences]


def with_place(sentence: str, source: str) -> str:
    """A sentence that begins with the place of what it is about."""
    return sentence if source == COMMAND_LINE else f"{source}: {sentence}"


@contextmanager
def problems_in_place(options: OptionGroup) -> Iterator[None]:
    """Whatever mistakes of the user are found in the block are told with their places."""
    try:
        yield
    except UserError as error:
        error.problems = in_place(error.problems, options)
        raise
