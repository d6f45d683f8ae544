"""A grid of pictures as PNG files and as one page of HTML with its pictures in it. Needs no torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from PIL import Image, ImageDraw

from library.dataset.picture_files import open_picture
from library.files import write_text_whole
from library.generating.axes import Axis, Cell
from library.generating.html import embedded, page
from library.pictures import Font, font_for, wrapped, write_picture

CELL = 256  # longest side of a picture in the PNG file, in pixels
GAP, MARGIN = 8, 20
TEXT, TITLE = 15, 20
MAX_LINES = 3
MAX_SIDE = 16_000  # of a PNG file; pictures are made smaller to stay below
INK, GREY, PAPER = "#16181d", "#667080", "#ffffff"


@dataclass(frozen=True)
class Grid:
    """A table of pictures for each value of z; `cells` have z outermost, then y, then x."""

    title: str
    notes: list[str]  # what all pictures share
    x: Axis
    y: Axis
    z: Axis | None
    cells: list[Cell]
    paths: dict[Cell, Path]

    def tables(self) -> list[tuple[str, list[list[Path]]]]:
        """A heading and rows of pictures for each value of z."""
        width, size = len(self.x.values), len(self.x.values) * len(self.y.values)
        headings = [f"{self.z.name}: {value.label}" for value in self.z.values] if self.z else [""]
        paths = [self.paths[cell] for cell in self.cells]
        return [
            (heading, [paths[start : start + width] for start in range(number * size, (number + 1) * size, width)])
            for number, heading in enumerate(headings)
        ]


def write_grid(grid: Grid, folder: Path) -> list[Path]:
    """Write `grid.html`, and `grid.png` or one PNG for each value of z; the files written."""
    tables = grid.tables()
    names = ["grid.png"] if len(tables) == 1 else [f"grid-{n:02d}.png" for n in range(1, len(tables) + 1)]
    for name, (heading, rows) in zip(names, tables, strict=True):
        write_picture(folder / name, drawn_table(grid, heading, rows))
    write_text_whole(folder / "grid.html", page(grid.title, grid_section(grid, tables), wide=True))
    return [folder / "grid.html", *(folder / name for name in names)]


def drawn_table(grid: Grid, heading: str, rows: list[list[Path]]) -> Image.Image:
    """One labelled table as a picture."""
    columns, lines = [value.label for value in grid.x.values], [value.label for value in grid.y.values]
    texts = [grid.title, heading, grid.x.name, grid.y.name, *grid.notes, *columns, *lines]
    font, _ = font_for("".join(texts), TEXT)
    sizes = [Image.open(path).size for row in rows for path in row]
    width, height = max(w for w, _ in sizes), max(h for _, h in sizes)
    zoom = min(CELL / max(width, height), MAX_SIDE / (width * len(columns)), MAX_SIDE / (height * len(rows)))
    cell_w, cell_h = max(96, round(width * zoom)), round(height * zoom)
    side = min(220, max(math.ceil(font.getlength(f"{grid.y.name} {text}")) for text in lines) + 16)
    line = sum(font.getmetrics()) + 2
    tops = [wrapped(text, font, cell_w - 4, MAX_LINES) for text in columns]
    total_w = MARGIN * 2 + side + len(columns) * (cell_w + GAP) - GAP
    notes = [text for note in [heading, *grid.notes] if note for text in wrapped(note, font, total_w - 2 * MARGIN, 2)]
    head = MARGIN + TITLE + 12 + line * len(notes) + 14 + line * (1 + max(map(len, tops)))
    sheet = Image.new("RGB", (total_w, head + len(rows) * (cell_h + GAP) + MARGIN), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, MARGIN), grid.title, fill=INK, font=font.font_variant(size=TITLE))
    for number, note in enumerate(notes):
        pen.text((MARGIN, MARGIN + TITLE + 12 + number * line), note, fill=GREY, font=font)
    _draw_column_labels(pen, grid.x.name, tops, MARGIN + side, cell_w, head, line, font)
    for row, (label, paths) in enumerate(zip(lines, rows, strict=True)):
        top = head + row * (cell_h + GAP)
        for number, text in enumerate([grid.y.name, *wrapped(label, font, side - 12, 6)]):
            pen.text((MARGIN, top + 4 + number * line), text, fill=INK if number else GREY, font=font)
        for column, path in enumerate(paths):
            with open_picture(path) as picture:
                small = picture.resize(
                    (round(picture.width * zoom), round(picture.height * zoom)), Image.Resampling.LANCZOS
                )
            sheet.paste(small, (MARGIN + side + column * (cell_w + GAP), top))
    return sheet


def _draw_column_labels(
    pen: ImageDraw.ImageDraw,
    name: str,
    texts: list[list[str]],
    left: int,
    width: int,
    bottom: int,
    line: int,
    font: Font,
) -> None:
    most = max(map(len, texts))
    pen.text((left, bottom - (most + 1) * line - 6), name, fill=GREY, font=font)
    for column, lines in enumerate(texts):
        for number, text in enumerate(lines):
            place = (left + column * (width + GAP), bottom - 6 - (len(lines) - number) * line)
            pen.text(place, text, fill=INK, font=font)


def grid_section(grid: Grid, tables: Sequence[tuple[str, list[list[Path]]]] | None = None) -> str:
    """The tables as HTML."""
    parts = [f'<p class="note">{escape(note)}</p>' for note in grid.notes]
    for heading, rows in tables or grid.tables():
        heads = "".join(f"<th>{escape(value.label)}</th>" for value in grid.x.values)
        corner = f"<th class=corner>{escape(grid.y.name)} ↓ &nbsp; {escape(grid.x.name)} →</th>"
        body = "".join(
            f"<tr><th>{escape(value.label)}</th>" + "".join(f"<td>{embedded(path)}</td>" for path in row) + "</tr>"
            for value, row in zip(grid.y.values, rows, strict=True)
        )
        title = f"<h3>{escape(heading)}</h3>" if heading else ""
        table = f"<table class=grid><thead><tr>{corner}{heads}</tr></thead><tbody>{body}</tbody></table>"
        parts.append(f"{title}<div class=scroll>{table}</div>")
    return "\n".join(parts)
