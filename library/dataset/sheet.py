"""Sheets of what training sees: pictures as drawn, with their captions, batch by batch. Needs no torch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from library import panels as layout
from library.dataset.config import SubsetOptions
from library.dataset.sampler import Draw
from library.dataset.scan import ImageRecord
from library.dataset.views import View, Views
from library.errors import counted
from library.panels import BLACK, GREY, ORANGE, Layout, Line, fitted

NUM_FIRST_BATCHES = 10
MAX_BATCHES = 40
MAX_TILES = 12  # pictures shown of one batch
PICTURE = 256  # longest side of a picture on a sheet
MAX_CAPTION_LINES = 8
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


def marks_of(view: View, record: ImageRecord, subset: SubsetOptions) -> tuple[str, ...]:
    """What is to be said of a picture that is seen this way."""
    marks = {
        "reg": subset.is_reg,
        "preserved": subset.diff_output_preservation,
        "only latents": record.is_gone,
        "mirrored": view.flipped,
        "masked": view.mask is not None and bool((view.mask < 1).any()),
    }
    return tuple(mark for mark, applies in marks.items() if applies)


def thumbnail(view: View, longest_side: int = PICTURE) -> Image.Image:
    """The picture of a view, dark where the loss does not count, shrunk to fit or enlarged by a whole number."""
    pixels = view.pixels
    if view.mask is not None:
        pixels = (pixels * (0.25 + 0.75 * view.mask[..., None])).round().astype(np.uint8)
    return fitted(Image.fromarray(pixels), longest_side)


def draw_sheets(panels: Sequence[Panel], title: str) -> tuple[list[Image.Image], str]:
    """The panels on as many sheets as they need, and the characters for which there is no font."""
    laid_out = [layout.Panel(panel.title, [_laid_out(tile) for tile in panel.tiles]) for panel in panels]
    sheets, missing = layout.draw_panels(laid_out, title, Layout(picture=PICTURE))
    return list(sheets), missing


def _bucket(batch: list[Draw], views: Views) -> tuple:
    index = batch[0].index
    return views.subset(index).dataset, views.choices[index].bucket_wh


def _tile(draw: Draw, views: Views, num_repeats: int) -> Tile:
    record, subset = views.scanned.records[draw.index], views.subset(draw.index)
    view = views.view(draw, with_picture=not record.is_gone)
    if record.is_gone:
        width, height = views.choices[draw.index].bucket_wh
        view = replace(view, pixels=np.full((height, width, 3), BLANK, np.uint8))
    return Tile(
        picture=thumbnail(view),
        name=f"{record.path.parent.name}/{record.path.name}",
        num_repeats=num_repeats,
        marks=marks_of(view, record, subset),
        caption=view.caption,
    )


def _laid_out(tile: Tile) -> layout.Tile:
    facts = ", ".join([counted(tile.num_repeats, "repeat"), *tile.marks])
    is_reg = "reg" in tile.marks
    caption = Line(tile.caption, BLACK, MAX_CAPTION_LINES) if tile.caption else Line(NO_CAPTION)
    return layout.Tile(tile.picture, (Line(tile.name), Line(facts, ORANGE if is_reg else GREY), caption), is_reg)
