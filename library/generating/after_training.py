"""What a run makes of its network when it is trained: the grid, its card, the report."""

import logging
from pathlib import Path

from library.generating.axes import Cell, build_axis
from library.generating.cards import chosen_cover, cover_metadata, trigger_words, write_card
from library.generating.drawing import Artist
from library.generating.grid import TrainedNetwork
from library.generating.grid_options import USUAL_SEED, GridPlan, as_request
from library.generating.grid_recipe import draw_and_write
from library.generating.report import ReportParts, write_report
from library.generating.report_pictures import tiles_of
from library.generating.runs import find_run
from library.options.derived import network_module
from library.options.groups import TrainNetworkOptions
from library.preflight import Preflight
from library.training.network_recipe import NetworkRecipe
from library.training.rescue import goes_on, previews_may_fail

logger = logging.getLogger(__name__)

MAX_SECONDS = 0.7  # that the report may take to read pictures


def add_cover(options: TrainNetworkOptions, recipe: NetworkRecipe) -> Path | None:
    """Put the picture of --cover_image into the metadata of what is saved from now on; the picture."""
    if not options.cover_image or not recipe.accelerator.is_main_process:
        return None
    with goes_on("--cover_image: the network has no picture"):
        cover = chosen_cover(options.cover_image, find_run(str(recipe.names.final())).previews())
        if cover is None:
            logger.warning("--cover_image auto: there are no previews; give --sample_every_n_epochs, or a picture")
            return None
        recipe.metadata.cover = cover_metadata(cover)
        return cover
    return None


def finish_run(options: TrainNetworkOptions, recipe: NetworkRecipe, path: Path, cover: Path | None) -> None:
    """Write card and grid of a network that is saved; what fails is a warning."""
    if not recipe.accelerator.is_main_process:
        return
    if options.cover_image:
        with goes_on("the network has no card"):
            fields = recipe.metadata.fields
            words = trigger_words(fields, options.metadata_trigger_phrase)
            write_card(path, cover, fields, words, options.metadata_description or "")
    if options.grid_after_training:
        with previews_may_fail("the end: no grid", options):
            draw_grid_of_run(options, recipe)


def draw_grid_of_run(options: TrainNetworkOptions, recipe: NetworkRecipe) -> list[Path]:
    """The sample prompts with the network of each saved epoch at strengths 0.5 to 1.0."""
    run = find_run(str(recipe.names.final()))
    requests = [as_request(prompt, USUAL_SEED) for prompt in recipe.prompts]
    axes = {kind: build_axis(kind, "--grid_after_training", run.networks, requests)
            for kind in ("epoch", "strength", "prompt")}  # fmt: skip
    family = recipe.family
    plan = GridPlan(
        title=run.name,
        base=Path(options.pretrained_model_name_or_path),
        family=family.name,
        model=family.options,
        module=network_module(options),
        precision=options.mixed_precision,
        x=axes["epoch"],
        y=axes["strength"],
        z=axes["prompt"] if len(requests) > 1 else None,
        first=Cell(run.networks[-1], 1.0, requests[0]),
        sampler=options.sample_sampler,
        folder=run.grid_folder,
        networks=run.networks,
    )
    recipe.resting_mode()
    return draw_and_write(plan, Artist(family, options.sample_sampler), TrainedNetwork(recipe.network))


def report_on(options: TrainNetworkOptions, checked: Preflight, recipe: NetworkRecipe) -> None:
    """Write NAME-report.html, unless --no_report."""
    if options.no_report or not recipe.accelerator.is_main_process:
        return
    with goes_on("there is no report on the run"):
        tiles = tiles_of(checked.scanned, options.seed or 0, checked.plan.max_train_steps, MAX_SECONDS)
        logger.info("report: %s", write_report(find_run(str(recipe.names.final())), ReportParts(tiles)))
