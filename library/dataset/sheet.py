"""Sheets of what training sees: pictures as drawn, with their captions, batch by batch. Needs no torch."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

from library.dataset.sampler import Draw
from library.dataset.views import View, Views
from library.errors import counted
from library.pictures import Font, font_for, shortened, wrapped

NUM_FIRST_BATCHES = 10
MAX_BATCHES = 40
MAX_TILES = 12  # pictures shown of one batch
COLUMNS = 6
PICTURE = 256  # longest side of a picture on a sheet
SHEET_HEIGHT = 2400  # a new sheet begins where the next line of panels would go over it
MARGIN, GAP, PADDING = 24, 16, 14  # around the sheet; between pictures, and panels; inside a panel
TEXT_SIZE, TITLE_SIZE, MAX_CAPTION_LINES = 14, 20, 8
WHITE, PANEL, BLACK, GREY, ORANGE = "#ffffff", "#eef0f3", "#16181d", "#667080", "#d9730d"
BLANK = 200  # grey in place of a picture that is gone
NO_CAPTION = "(empty caption)"


@dataclass(frozen=True)
class Tile:
    """One draw on a sheet."""

    picture: Image.Image
    name: str
    num_repeats: int
    marks: tuple[str, ...]  # "reg", "preserved", "only latents", "mirrored", "masked"
    caption: str


@dataclass(frozen=True)
class Panel:
    """One batch on a sheet."""

    number: int  # of the batch in its epoch, from 1
    step: int  # from 1
    size_wh: tuple[int, int]  # of the bucket, in pixels
    tiles: list[Tile]
    num_left_out: int  # pictures of the batch that are not shown

    @property
    def title(self) -> str:
        more = f", {self.num_left_out} more" if self.num_left_out else ""
        return f"batch {self.number}, step {self.step}, {self.size_wh[0]}x{self.size_wh[1]}{more}"


@dataclass(frozen=True)
class Block:
    """A panel as it is laid out: tiles in rows, each row as high as its highest tile."""

    panel: Panel
    num_columns: int
    texts: list[list[tuple[str, str]]]  # for each tile, its lines with their colours
    line_height: int

    @property
    def width(self) -> int:
        return self.num_columns * (PICTURE + GAP) - GAP + 2 * PADDING

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


def chosen_batches(batches: Sequence[list[Draw]], views: Views) -> list[int]:
    """Which batches to show: the first ones, and the first of every other bucket, as far as there is room."""
    chosen = list(range(min(NUM_FIRST_BATCHES, len(batches))))
    seen = {_bucket(batches[number], views) for number in chosen}
    for number, batch in enumerate(batches):
        if len(chosen) < MAX_BATCHES and (bucket := _bucket(batch, views)) not in seen:
            seen.add(bucket)
            chosen.append(number)
    return sorted(chosen)


def num_buckets(batches: Sequence[list[Draw]], views: Views) -> int:
    """How many buckets the batches are of."""
    return len({_bucket(batch, views) for batch in batches})


def panel_of(number: int, batch: list[Draw], views: Views, repeats: Sequence[int]) -> Panel:
    """A batch of an epoch as it is shown; `number` counts from 0."""
    shown = batch[:MAX_TILES]
    tiles = [_tile(draw, views, repeats[draw.index]) for draw in shown]
    bucket_wh = views.choices[batch[0].index].bucket_wh
    return Panel(number + 1, batch[0].step + 1, bucket_wh, tiles, len(batch) - len(shown))


def thumbnail(view: View) -> Image.Image:
    """The picture of a view, dark where the loss does not count, shrunk to fit or enlarged by a whole number."""
    pixels = view.pixels
    if view.mask is not None:
        pixels = (pixels * (0.25 + 0.75 * view.mask[..., None])).round().astype(np.uint8)
    picture = Image.fromarray(pixels)
    longest = max(picture.size)
    if longest > PICTURE:
        size = [max(1, round(side * PICTURE / longest)) for side in picture.size]
        return picture.resize(size, Image.Resampling.LANCZOS)
    zoom = PICTURE // longest
    return picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)


def draw_sheets(panels: Sequence[Panel], title: str) -> tuple[list[Image.Image], str]:
    """The panels on as many sheets as they need, and the characters for which there is no font."""
    texts = [text for panel in panels for tile in panel.tiles for text in (tile.name, tile.caption)]
    font, missing = font_for("".join([title, *texts]), TEXT_SIZE)
    sheets = list(_sheets([_block(panel, font) for panel in panels]))
    titles = [f"{title}, sheet {number} of {len(sheets)}" for number in range(1, len(sheets) + 1)]
    return [_draw_sheet(lines, text, font) for lines, text in zip(sheets, titles, strict=True)], missing


def _bucket(batch: list[Draw], views: Views) -> tuple:
    index = batch[0].index
    return views.subset(index).dataset, views.choices[index].bucket_wh


def _tile(draw: Draw, views: Views, num_repeats: int) -> Tile:
    record, subset = views.scanned.records[draw.index], views.subset(draw.index)
    view = views.view(draw, with_picture=not record.is_gone)
    if record.is_gone:
        width, height = views.choices[draw.index].bucket_wh
        view = replace(view, pixels=np.full((height, width, 3), BLANK, np.uint8))
    marks = {
        "reg": subset.is_reg,
        "preserved": subset.diff_output_preservation,
        "only latents": record.is_gone,
        "mirrored": view.flipped,
        "masked": view.mask is not None and bool((view.mask < 1).any()),
    }
    return Tile(
        picture=thumbnail(view),
        name=f"{record.path.parent.name}/{record.path.name}",
        num_repeats=num_repeats,
        marks=tuple(mark for mark, applies in marks.items() if applies),
        caption=view.caption,
    )


def _block(panel: Panel, font: Font) -> Block:
    num_rows = math.ceil(len(panel.tiles) / COLUMNS)
    texts = [_text_below(tile, font) for tile in panel.tiles]
    return Block(panel, math.ceil(len(panel.tiles) / num_rows), texts, sum(font.getmetrics()) + 2)


def _text_below(tile: Tile, font: Font) -> list[tuple[str, str]]:
    facts = ", ".join([counted(tile.num_repeats, "repeat"), *tile.marks])
    return [
        (shortened(tile.name, font, PICTURE), GREY),
        (facts, ORANGE if "reg" in tile.marks else GREY),
        *((line, BLACK) for line in wrapped(tile.caption, font, PICTURE, MAX_CAPTION_LINES) if tile.caption),
        *([] if tile.caption else [(NO_CAPTION, GREY)]),
    ]


def _sheets(blocks: list[Block]) -> Iterator[list[list[Block]]]:
    """Blocks side by side in lines, and lines below each other on sheets."""
    sheet: list[list[Block]] = []
    for line in _lines(blocks):
        if sheet and sum(_line_height(other) + GAP for other in [*sheet, line]) > SHEET_HEIGHT:
            yield sheet
            sheet = []
        sheet.append(line)
    yield sheet


def _lines(blocks: list[Block]) -> Iterator[list[Block]]:
    line: list[Block] = []
    for block in blocks:
        if sum(other.num_columns for other in [*line, block]) > COLUMNS:
            yield line
            line = []
        line.append(block)
    yield line


def _line_height(line: list[Block]) -> int:
    return max(block.height for block in line)


def _draw_sheet(lines: list[list[Block]], title: str, font: Font) -> Image.Image:
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


def _draw_block(sheet: Image.Image, left_top: tuple[int, int], block: Block, height: int, font: Font) -> None:
    pen, (left, top) = ImageDraw.Draw(sheet), left_top
    pen.rounded_rectangle((left, top, left + block.width - 1, top + height - 1), radius=8, fill=PANEL)
    left, top = left + PADDING, top + PADDING
    pen.text((left, top), block.panel.title, fill=GREY, font=font)
    top += block.line_height + 6
    for index, (tile, text) in enumerate(zip(block.panel.tiles, block.texts, strict=True)):
        row, column = divmod(index, block.num_columns)
        x = left + column * (PICTURE + GAP)
        y = top + sum(block.row_heights[:row]) + GAP * row
        sheet.paste(tile.picture, (x, y))
        if "reg" in tile.marks:
            pen.rectangle(
                (x - 3, y - 3, x + tile.picture.width + 2, y + tile.picture.height + 2), outline=ORANGE, width=3
            )
        for number, (words, colour) in enumerate(text):
            pen.text((x, y + block.picture_height + 8 + number * block.line_height), words, fill=colour, font=font)
