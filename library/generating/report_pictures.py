"""The pictures of a run's dataset for its report. Needs no torch."""

import time
from contextlib import suppress

from library.dataset.buckets import choose_buckets_of, repeats_of
from library.dataset.sampler import sampler_of
from library.dataset.scan import ScannedDataset, scan_dataset
from library.dataset.sheet import Tile, chosen_batches, panel_of
from library.dataset.views import Views
from library.errors import UserError
from library.generating.report import ReportParts
from library.generating.runs import Run
from library.options.cli import read_options
from library.options.groups import TrainNetworkOptions

MAX_TILES = 24


def tiles_of(scanned: ScannedDataset, seed: int, max_train_steps: int, max_seconds: float | None = None) -> list[Tile]:
    """The first pictures of the first epoch and of each size, each once; regularisation pictures come last.

    Large pictures take long to read: no further one is begun after `max_seconds`.
    """
    if scanned.own is not None:
        return []
    choices, repeats = choose_buckets_of(scanned), repeats_of(scanned)
    views = Views(scanned, choices, max_train_steps)
    batches = list(sampler_of(scanned, choices, repeats, seed))
    draws = {draw.index: (number, draw) for number in chosen_batches(batches, views) for draw in batches[number]}
    ordered = sorted(draws.values(), key=lambda item: views.subset(item[1].index).is_reg)
    tiles, start = [], time.perf_counter()
    for number, draw in ordered[:MAX_TILES]:
        if max_seconds is not None and time.perf_counter() - start > max_seconds:
            break
        with suppress(UserError):  # gone or damaged since training began, which has said so
            tiles += panel_of(number, [draw], views, repeats).tiles
    return tiles


def parts_of(run: Run) -> ReportParts:
    """What a report made later can show of the pictures, which may be gone."""
    record = run.folder / f"{run.name}-run.json"
    if not record.is_file():
        return ReportParts()
    try:
        options = read_options(TrainNetworkOptions, ["--config_file", str(record)])
        steps = run.record.get("progress", {}).get("steps", [0, 1])[1]
        return ReportParts(tiles_of(scan_dataset(options), options.seed or 0, steps))
    except UserError as error:
        return ReportParts(tiles_missing=f"The pictures cannot be shown: {error.problems[0]}")
