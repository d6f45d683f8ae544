"""The caption files of a folder: their bytes, encodings and texts."""

import codecs
import os
from collections.abc import Sequence
from functools import partial
from itertools import repeat
from typing import NamedTuple

from library.texts import fits

MAX_CAPTION_BYTES = 10**6
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "gbk")  # the index of a folder knows them by their places here
MARK = "\ufeff"  # before a text in UTF-8, or in UTF-16
LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"  # as str.splitlines knows them


class CaptionFile(NamedTuple):
    """A caption file as it was read."""

    num_bytes: int
    mtime_ns: int
    encoding: str  # one of ENCODINGS
    text: str


class TooLarge(Exception):
    """A file that is no caption."""


def read_caption_file(handle: int) -> CaptionFile | None:
    """The caption file just opened by os.open; None where it is in none of ENCODINGS."""
    status = os.fstat(handle)
    if status.st_size > MAX_CAPTION_BYTES:
        raise TooLarge
    content = os.read(handle, status.st_size + 1)
    while len(content) < status.st_size and (more := os.read(handle, status.st_size)):
        content += more
    return caption_of(content, status.st_mtime_ns)


def caption_of(content: bytes, mtime_ns: int) -> CaptionFile | None:
    """The bytes of a caption file as text; None where they are in none of ENCODINGS."""
    for encoding in _candidates(content):
        try:
            text = content.decode(encoding)
        except UnicodeDecodeError:
            continue
        if "\0" not in text:
            return CaptionFile(len(content), mtime_ns, encoding, text)
    return None


def captions_in(contents: bytes, mtimes_ns: Sequence[int]) -> list[CaptionFile | None]:
    """`caption_of` the contents of several files, NUL between them."""
    parts = contents.split(b"\0")
    try:
        text = contents.decode()
    except UnicodeDecodeError:
        text = MARK
    if MARK in text:
        return list(map(caption_of, parts, mtimes_ns))
    rows = zip(map(len, parts), mtimes_ns, repeat("utf-8"), text.split("\0"), strict=False)
    return list(map(partial(tuple.__new__, CaptionFile), rows))  # in a third of the time


def _candidates(content: bytes) -> tuple[str, ...]:
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return ("utf-16",)
    return ("utf-8-sig",) if content.startswith(codecs.BOM_UTF8) else ("utf-8", "gbk")


def as_neighbours(files: list[CaptionFile]) -> list[CaptionFile]:
    """The files of a folder, those in doubtful encodings read as the others are.

    A few Chinese characters in GBK, such as 猫, are by chance good UTF-8 of Cyrillic or Arabic letters: beside
    files that can only be GBK they are taken as GBK too.
    """
    if "gbk" not in {file.encoding for file in files}:
        return files
    return [_as_gbk(file) if _is_gbk_by_chance_utf8(file) else file for file in files]


def _is_gbk_by_chance_utf8(file: CaptionFile) -> bool:
    is_likely = file.encoding == "utf-8" and "\u007f" < max(file.text, default="") < "\u0800"
    return is_likely and fits(file.text.encode(), "gbk")


def _as_gbk(file: CaptionFile) -> CaptionFile:
    return file._replace(encoding="gbk", text=file.text.encode().decode("gbk"))


def captions_of(texts: list[str], all_lines: bool) -> list[str]:
    """Of each text the first line, or all lines that are not blank, one of which wildcards choose at each step."""
    whole = "\0".join(texts)
    if not any(end in whole for end in LINE_ENDS):
        return list(map(str.strip, texts))
    return [_lines_of(text.splitlines(), all_lines) for text in texts]


def _lines_of(lines: list[str], all_lines: bool) -> str:
    if not all_lines:
        return lines[0].strip() if lines else ""
    return "\n".join(line for line in map(str.strip, lines) if line)
