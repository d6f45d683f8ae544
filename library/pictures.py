"""Sheets of pictures with text, drawn with Pillow: fonts that have the characters, wrapped lines, tables."""

import io
import re
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from library.errors import quoted_list
from library.files import write_bytes_whole

# Fonts with Chinese, Japanese or Korean characters as they come with Windows, macOS and Linux, and one for other
# scripts. Pillow looks for them in each system's folders.
SYSTEM_FONTS = (
    *("msyh.ttc", "simhei.ttf", "simsun.ttc", "meiryo.ttc", "YuGothM.ttc", "msgothic.ttc", "malgun.ttf"),
    *("PingFang.ttc", "Hiragino Sans GB.ttc", "STHeiti Medium.ttc", "STHeiti Light.ttc", "AppleSDGothicNeo.ttc"),
    *("Arial Unicode.ttf", "NotoSansCJK-Regular.ttc", "NotoSansCJKsc-Regular.otf", "NotoSansSC-Regular.otf"),
    *("SourceHanSansSC-Regular.otf", "SourceHanSansCN-Regular.otf", "wqy-microhei.ttc", "wqy-zenhei.ttc"),
    *("DroidSansFallbackFull.ttf", "DroidSansFallback.ttf", "NotoSans-Regular.ttf", "DejaVuSans.ttf"),
)
_UNASSIGNED = "\U0010fffd"  # what a font draws for it, it draws for all characters that it lacks
_IDEOGRAPHS = "\u2e80-\ud7a3\uf900-\ufaff\uff00-\uffef"  # lines may break around each; punctuation stays with its word
_PIECES = re.compile(rf"[{_IDEOGRAPHS}][、。，．！？：；）」』】]*\s*|[^\s{_IDEOGRAPHS}]+\s*|\s+")

Font = ImageFont.FreeTypeFont


def font_for(text: str, size: int) -> tuple[Font, str]:
    """Pillow's own font, or the system's that has the most of the text; and the characters that it lacks."""
    best = ImageFont.load_default(size)
    missing = missing_characters(best, text)
    for name in SYSTEM_FONTS:
        if not missing:
            break
        try:
            font = ImageFont.truetype(name, size, layout_engine=ImageFont.Layout.BASIC)
        except OSError:  # not on this computer
            continue
        if len(still_missing := missing_characters(font, text)) < len(missing):
            best, missing = font, still_missing
    return best, missing


def missing_characters(font: Font, text: str) -> str:
    """The characters of a text that a font has no picture of, each once, in their order."""
    blank = font.getmask(_UNASSIGNED)

    def is_missing(character: str) -> bool:
        mask = font.getmask(character)
        return mask.size == blank.size and bytes(mask) == bytes(blank)

    return "".join(c for c in dict.fromkeys(text) if c.isprintable() and not c.isspace() and is_missing(c))


def note_on_missing(missing: str) -> str:
    """What to say of characters that no font has."""
    return (
        f"the sheets have boxes where no font of this computer has the character ({quoted_list(list(missing))}): "
        "install a font such as Noto Sans CJK"
    )


def wrapped(text: str, font: Font, width: int, max_lines: int) -> list[str]:
    """The text in lines of at most `width` pixels; dots stand for what does not fit in."""
    lines = [""]
    for piece in _PIECES.findall(text):
        if lines[-1] and font.getlength((lines[-1] + piece).rstrip()) > width:
            lines.append("")
        for character in piece:  # a word that is longer than a line is cut
            if lines[-1] and font.getlength((lines[-1] + character).rstrip()) > width:
                lines.append("")
            lines[-1] += character
    lines = [line.strip() for line in lines]
    if len(lines) > max_lines:
        last = lines[max_lines - 1]
        while last and font.getlength(f"{last}...") > width:
            last = last[:-1]
        lines = [*lines[: max_lines - 1], f"{last}..."]
    return lines


def shortened(text: str, font: Font, width: int) -> str:
    """The text, or as much of its beginning and end as fit into `width` pixels."""
    short, num_kept = text, len(text)
    while font.getlength(short) > width and num_kept > 2:
        num_kept -= 1
        short = f"{text[: num_kept // 2]}...{text[-(num_kept - num_kept // 2) :]}"
    return short


def labelled_sheet(rows: list[list[Image.Image]], row_labels: list[str], column_labels: list[str]) -> Image.Image:
    """A table of pictures with its labels; all cells are as large as the largest picture, at least 192 pixels."""
    width = max(picture.width for row in rows for picture in row)
    height = max(picture.height for row in rows for picture in row)
    zoom = max(1, round(192 / max(width, height)))
    cell_w, cell_h, head, side = width * zoom, height * zoom, 44, 70
    sheet = Image.new("RGB", (side + cell_w * len(column_labels), head + cell_h * len(rows)), "white")
    pen, (font, _) = ImageDraw.Draw(sheet), font_for("".join(column_labels), 14)
    for row, (pictures, label) in enumerate(zip(rows, row_labels, strict=True)):
        pen.text((6, head + cell_h * row + cell_h // 2), label, fill="black", font=font)
        for column, picture in enumerate(pictures):
            scaled = picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.LANCZOS)
            sheet.paste(scaled, (side + cell_w * column, head + cell_h * row))
    for column, label in enumerate(column_labels):
        lines = wrapped(label, font, cell_w - 8, max_lines=2)
        pen.multiline_text((side + cell_w * column + 4, 4), "\n".join(lines), fill="black", font=font)
    return sheet


def write_picture(path: Path, picture: Image.Image, texts: dict[str, str] | None = None) -> None:
    """Write a PNG file, with texts by name in it where there are any."""
    data, info = io.BytesIO(), PngImagePlugin.PngInfo()
    for name, text in (texts or {}).items():
        info.add_itxt(name, text)
    picture.save(data, format="PNG", pnginfo=info)
    write_bytes_whole(path, data.getbuffer())
