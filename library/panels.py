"""Pictures with lines of text below them, in panels that are laid out on sheets. Needs no torch."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image, ImageDraw

from library.pictures import Font, font_for, shortened, wrapped

MARGIN, GAP, PADDING = 24, 16, 14  # around the sheet; between pictures, and panels; inside a panel
TEXT_SIZE, TITLE_SIZE = 14, 20
WHITE, PANEL, BLACK, GREY, ORANGE = "#ffffff", "#eef0f3", "#16181d", "#667080", "#d9730d"


@dataclass(frozen=True)
class Layout:
    """How large things are on a sheet, in pixels."""

    picture: int = 256  # longest side of a picture
    columns: int = 6
    sheet_height: int = 2400  # a new sheet begins where the next line of panels would go over it


class Line(NamedTuple):
    """Text below a picture."""

    text: str
    colour: str = GREY
    max_lines: int = 1  # longer text is cut in its middle, or wrapped where there may be several lines


@dataclass(frozen=True)
class Tile:
    """One picture of a panel."""

    picture: Image.Image
    lines: tuple[Line, ...]
    is_framed: bool = False


@dataclass(frozen=True)
class Panel:
    """Pictures that belong together."""

    title: str
    tiles: Sequence[Tile]


@dataclass(frozen=True)
class _Block:
    """A panel as it is laid out: tiles in rows, each row as high as its highest tile."""

    panel: Panel
    layout: Layout
    num_columns: int
    texts: list[list[Line]]  # for each tile, its text in lines that fit
    line_height: int

    @property
    def width(self) -> int:
        return self.num_columns * (self.layout.picture + GAP) - GAP + 2 * PADDING

    @property
    def height(self) -> int:
        return 2 * PADDING + self.line_height + 6 + sum(self.row_heights) + GAP * (len(self.row_heights) - 1)

    @property
    def picture_height(self) -> int:
        return max(tile.picture.height for tile in self.panel.tiles)

    @property
    def row_heights(self) -> list[int]:
        rows = [self.texts[i : i + self.num_columns] for i in range(0, len(self.texts), self.num_columns)]
        return [self.picture_height + 8 + self.line_height * max(len(text) for text in row) for row in rows]


def draw_panels(panels: Sequence[Panel], title: str, layout: Layout) -> tuple[Iterator[Image.Image], str]:
    """The panels on as many sheets as they need, one drawn at a time, and the characters that no font has."""
    texts = [text for panel in panels for tile in panel.tiles for text in tile.lines]
    font, missing = font_for("".join([title, *(p.title for p in panels), *(line.text for line in texts)]), TEXT_SIZE)
    blocks = [_block(part, layout, font) for panel in panels for part in _parts(panel, layout)]
    sheets = list(_sheets(blocks, layout))
    titles = [f"{title}, sheet {number} of {len(sheets)}" for number in range(1, len(sheets) + 1)]
    return (_draw_sheet(lines, text, font) for lines, text in zip(sheets, titles, strict=True)), missing


def fitted(picture: Image.Image, longest_side: int) -> Image.Image:
    """The picture shrunk to fit, or enlarged by a whole number."""
    longest = max(picture.size)
    if longest > longest_side:
        size = [max(1, round(side * longest_side / longest)) for side in picture.size]
        return picture.resize(size, Image.Resampling.LANCZOS)
    zoom = longest_side // longest
    return picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)


def _parts(panel: Panel, layout: Layout) -> Iterator[Panel]:
    """A panel that would be higher than a sheet in several."""
    num_rows = max(1, layout.sheet_height // (layout.picture + 100))
    num_tiles = num_rows * layout.columns
    for start in range(0, len(panel.tiles), num_tiles):
        title = f"{panel.title}, from {start + 1}" if start else panel.title
        yield Panel(title, panel.tiles[start : start + num_tiles])


def _block(panel: Panel, layout: Layout, font: Font) -> _Block:
    num_rows = math.ceil(len(panel.tiles) / layout.columns)
    texts = [[line for text in tile.lines for line in _fitting(text, layout, font)] for tile in panel.tiles]
    num_columns = math.ceil(len(panel.tiles) / num_rows)
    return _Block(panel, layout, num_columns, texts, sum(font.getmetrics()) + 2)


def _fitting(line: Line, layout: Layout, font: Font) -> list[Line]:
    if line.max_lines == 1:
        return [line._replace(text=shortened(line.text, font, layout.picture))]
    return [line._replace(text=part) for part in wrapped(line.text, font, layout.picture, line.max_lines)]


def _sheets(blocks: list[_Block], layout: Layout) -> Iterator[list[list[_Block]]]:
    """Blocks side by side in lines, and lines below each other on sheets."""
    sheet: list[list[_Block]] = []
    for line in _lines(blocks, layout):
        if sheet and sum(_line_height(other) + GAP for other in [*sheet, line]) > layout.sheet_height:
            yield sheet
            sheet = []
        sheet.append(line)
    yield sheet


def _lines(blocks: list[_Block], layout: Layout) -> Iterator[list[_Block]]:
    line: list[_Block] = []
    for block in blocks:
        if sum(other.num_columns for other in [*line, block]) > layout.columns:
            yield line
            line = []
        line.append(block)
    yield line


def _line_height(line: list[_Block]) -> int:
    return max(block.height for block in line)


def _draw_sheet(lines: list[list[_Block]], title: str, font: Font) -> Image.Image:
    title_font = font.font_variant(size=TITLE_SIZE)
    head = sum(title_font.getmetrics()) + GAP
    width = max(sum(block.width + GAP for block in line) - GAP for line in lines)
    width = max(width, math.ceil(title_font.getlength(title)))
    height = sum(_line_height(line) + GAP for line in lines) - GAP
    sheet = Image.new("RGB", (width + 2 * MARGIN, height + head + 2 * MARGIN), WHITE)
    ImageDraw.Draw(sheet).text((MARGIN, MARGIN), title, fill=BLACK, font=title_font)
    top = MARGIN + head
    for line in lines:
        left = MARGIN
        for block in line:
            _draw_block(sheet, (left, top), block, _line_height(line), font)
            left += block.width + GAP
        top += _line_height(line) + GAP
    return sheet


def _draw_block(sheet: Image.Image, left_top: tuple[int, int], block: _Block, height: int, font: Font) -> None:
    pen, (left, top) = ImageDraw.Draw(sheet), left_top
    pen.rounded_rectangle((left, top, left + block.width - 1, top + height - 1), radius=8, fill=PANEL)
    left, top = left + PADDING, top + PADDING
    pen.text((left, top), shortened(block.panel.title, font, block.width - 2 * PADDING), fill=GREY, font=font)
    top += block.line_height + 6
    for index, (tile, text) in enumerate(zip(block.panel.tiles, block.texts, strict=True)):
        row, column = divmod(index, block.num_columns)
        x = left + column * (block.layout.picture + GAP)
        y = top + sum(block.row_heights[:row]) + GAP * row
        sheet.paste(tile.picture, (x, y))
        if tile.is_framed:
            frame = (x - 3, y - 3, x + tile.picture.width + 2, y + tile.picture.height + 2)
            pen.rectangle(frame, outline=ORANGE, width=3)
        for number, line in enumerate(text):
            pen.text(
                (x, y + block.picture_height + 8 + number * block.line_height), line.text, fill=line.colour, font=font
            )
