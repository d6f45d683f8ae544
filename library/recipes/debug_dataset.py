"""Showing what the dataset yields instead of training: `--debug_dataset`. Needs no torch."""

import logging
from pathlib import Path

from library.dataset.sampler import sampler_of
from library.dataset.sheet import NO_CAPTION, Panel, chosen_batches, draw_sheets, num_buckets, panel_of
from library.dataset.views import Views
from library.errors import one_line
from library.options.groups import TrainNetworkOptions
from library.pictures import note_on_missing, write_picture
from library.preflight import Preflight
from library.training.plan import is_main_process
from library.training.reports import aligned

logger = logging.getLogger(__name__)


def show_dataset(options: TrainNetworkOptions, checked: Preflight) -> list[Path]:
    """Print the captions of the first epoch and draw its pictures, batch by batch; returns the sheets' paths."""
    if not is_main_process():
        return []
    if options.seed is None:
        logger.info("without --seed every run has its own order; this is that of --seed 0")
    seed, plan = options.seed or 0, checked.plan
    views = Views(checked.scanned, checked.choices, plan.max_train_steps, options.fast_jpeg)
    sampler = sampler_of(checked.scanned, checked.choices, checked.repeats, seed, plan.accumulation, plan.num_processes)
    batches = list(sampler)
    numbers = chosen_batches(batches, views)
    panels = [panel_of(number, batches[number], views, checked.repeats) for number in numbers]
    print(captions_table(panels), flush=True)
    paths = write_sheets(panels, options, f"{options.output_name or 'dataset'}: epoch 1, seed {seed}")
    num_sizes = num_buckets([batches[number] for number in numbers], views)
    print(
        f"shown: {sum(len(panel.tiles) for panel in panels)} of {plan.num_items} pictures with repeats, "
        f"{len(panels)} of {len(batches)} batches, {num_sizes} of {num_buckets(batches, views)} sizes, in:"
    )
    print(*paths, sep="\n", flush=True)
    return paths


def captions_table(panels: list[Panel]) -> str:
    """Every picture shown, with the caption that its step would train."""
    rows = [("batch", "step", "size", "repeats", "picture", "", "caption")]
    for panel in panels:
        size = f"{panel.size_wh[0]}x{panel.size_wh[1]}"
        for tile in panel.tiles:
            counts = (str(panel.number), str(panel.step), size, str(tile.num_repeats))
            rows.append((*counts, one_line(tile.name), " ".join(tile.marks), one_line(tile.caption) or NO_CAPTION))
    return aligned(rows, numbers=(0, 1, 2, 3))


def write_sheets(panels: list[Panel], options: TrainNetworkOptions, title: str) -> list[Path]:
    """Draw the panels into the output folder, as NAME-dataset-000001.png and so on."""
    sheets, missing = draw_sheets(panels, title)
    if missing:
        logger.warning("%s, or read the captions above", note_on_missing(missing))
    stem = f"{options.output_name}-dataset" if options.output_name else "dataset"
    paths = [Path(options.output_dir) / f"{stem}-{number:06d}.png" for number in range(1, len(sheets) + 1)]
    for path, sheet in zip(paths, sheets, strict=True):
        write_picture(path, sheet)
    return paths
