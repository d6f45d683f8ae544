"""The pictures of a run's dataset for its report. Needs no torch."""

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


def tiles_of(scanned: ScannedDataset, seed: int, max_train_steps: int) -> list[Tile]:
    """The first pictures of the first epoch and of each size, each once; regularisation pictures come last."""
    if scanned.own is not None:
        return []
    choices, repeats = choose_buckets_of(scanned), repeats_of(scanned)
    views = Views(scanned, choices, max_train_steps)
    batches = list(sampler_of(scanned, choices, repeats, seed))
    tiles: dict[str, Tile] = {}
    for number in chosen_batches(batches, views):
        fresh = [draw for draw in batches[number] if _name(scanned, draw.index) not in tiles]
        if len(tiles) >= MAX_TILES or not fresh:
            continue
        for draw, tile in zip(fresh, panel_of(number, fresh, views, repeats).tiles, strict=False):
            tiles[_name(scanned, draw.index)] = tile
    return sorted(tiles.values(), key=lambda tile: "reg" in tile.marks)[:MAX_TILES]


def _name(scanned: ScannedDataset, index: int) -> str:
    return str(scanned.records[index].path)


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
