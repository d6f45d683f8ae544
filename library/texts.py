"""Text that comes from outside: decoded from bytes, and read as JSON."""

import codecs
import json
import re
from typing import Any

from library.errors import UserError

HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")  # in JSON; two of them together are a whole one


def decoded(data: bytes, place: str) -> str:
    """A text in UTF-8, with or without a mark at its start; a UserError names the place and the likely encoding."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        likely = likely_encoding(data)
        seems = f" but seems to be in {likely.upper()}" if likely else ""
        raise UserError(f"{place}:{line}: the file is not in UTF-8{seems}: save it as UTF-8") from None
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise UserError(f"{place}:{line}: the file has NUL bytes, so that it is no text in UTF-8: save it as UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def likely_encoding(data: bytes) -> str | None:
    """The codec of a text that is not in UTF-8; None where it is in none that editors on Windows save."""
    codec = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "gbk"
    return codec if fits(data, codec) else None


def fits(data: bytes, codec: str) -> bool:
    """Whether bytes are text in this encoding."""
    try:
        data.decode(codec)
    except UnicodeDecodeError:
        return False
    return True


def is_unicode(text: str) -> bool:
    """Whether a text can be written in UTF-8; names of files in other encodings cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_json(text: str) -> Any:
    """The value of a JSON text; a JSONDecodeError for all that cannot be read, or not be written again."""
    try:
        value = json.loads(text)
        if HALF_CHARACTER.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise json.JSONDecodeError("lists and objects are nested too deep", text, 0) from None
    except UnicodeEncodeError:
        raise json.JSONDecodeError(r"half a character, \ud800 to \udfff", text, 0) from None
    except ValueError:
        raise json.JSONDecodeError("a number has thousands of digits", text, 0) from None
    return value
