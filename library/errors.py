"""How a script ends when something is wrong: mistakes of the user in plain sentences, our own bugs in a log."""

import logging
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

from library.secrets import redacted

logger = logging.getLogger(__name__)

EXIT_BUG = 1
EXIT_MISTAKE = 2
EXIT_STOPPED = 3
EXIT_OUT_OF_MEMORY = 4
EXIT_DIVERGED = 5
EXIT_FINDINGS = 6  # a check found something, which is no mistake of the command
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")  # ends of lines, directions of writing


class UserError(ValueError):
    """One or more mistakes in what the user gave; each problem is one sentence that names flag, file or key."""

    exit_code = EXIT_MISTAKE

    def __init__(self, *problems: str):
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


class OutOfMemory(UserError):
    """The device has less memory than the run needs; the sentence says what needs less."""

    exit_code = EXIT_OUT_OF_MEMORY


class Diverged(UserError):
    """The loss is no number any more; the sentence says since when, and what the cause may be."""

    exit_code = EXIT_DIVERGED


class CannotWrite(OSError):
    """A file or folder could not be written; what was there before is there still."""

    exit_code = EXIT_MISTAKE

    def __init__(self, path: Path, reason: str, kept: Path | None = None):
        super().__init__(None, reason, str(path))
        self.kept = kept  # where the new file is instead

    def __str__(self) -> str:
        return f"{self.filename} cannot be written: {self.strerror}"


class Stopped(Exception):
    """The run ended before its time because it was asked to; the message says what was saved."""


def quoted_list(names: list[str], limit: int = 10) -> str:
    """Names for a sentence: "a, b, c", and how many more where there are over `limit`."""
    shown = ", ".join(names[:limit])
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """A number of things for a sentence: "1 picture", "2 pictures"."""
    return f"{number} {noun}" if number == 1 else f"{number} {plural or f'{noun}s'}"


def one_line(text: str) -> str:
    """A text with its line ends and other control characters written as \\n, \\x1b and so on."""
    return CONTROL.sub(lambda match: ascii(match[0])[1:-1], text)


def first_line(error: Exception) -> str:
    """The first line of an error's message, for a sentence."""
    return (str(error).strip() or "no message").splitlines()[0]


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main function; what ends it is told in sentences and an exit code, a bug also in a log file."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    try:
        main()
    except UserError as error:
        for problem in error.problems:
            print(f"error: {one_line(redacted(problem))}", file=sys.stderr)
        sys.exit(error.exit_code)
    except CannotWrite as error:
        print(f"error: {one_line(redacted(str(error)))}", file=sys.stderr)
        sys.exit(error.exit_code)
    except Stopped as stopped:
        print(one_line(redacted(str(stopped))), file=sys.stderr)
        sys.exit(EXIT_STOPPED)
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        print(f"error: {type(error).__name__}: {one_line(redacted(first_line(error)))}", file=sys.stderr)
        print(f"This is not a mistake of yours that we know of; {_place_of_traceback()}", file=sys.stderr)
        sys.exit(EXIT_BUG)


def _place_of_traceback() -> str:
    """Write the traceback of the error at hand into a file, or show it where that is impossible; say where it is."""
    try:
        handle, name = tempfile.mkstemp(prefix="athanor-error-", suffix=".log")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(redacted(traceback.format_exc()))
    except OSError:
        print(redacted(traceback.format_exc()), file=sys.stderr)
        return "the traceback is above"
    return f"the traceback is in {name}"
