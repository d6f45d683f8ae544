"""Making a grid, with a model that is loaded for it or one that a run has still at hand."""

import logging
from pathlib import Path

from library.errors import counted
from library.generating.drawing import Artist
from library.generating.grid import Networks, NetworksInTurn, cells_of, draw_cells
from library.generating.grid_options import GridPlan, shared_notes
from library.generating.grid_pages import Grid, write_grid
from library.generating.models import load_family
from library.generating.session import enough_memory
from library.training.precision import DTYPES

logger = logging.getLogger(__name__)


def draw_grid(plan: GridPlan) -> list[Path]:
    """Load the model, draw what is missing, and write the grid."""
    family = load_family(plan.family, plan.model, DTYPES[plan.precision])
    networks = NetworksInTurn(family, plan.module, [network.path for network in plan.networks])
    return draw_and_write(plan, Artist(family, plan.sampler), networks)


def draw_and_write(plan: GridPlan, artist: Artist, networks: Networks) -> list[Path]:
    """Draw what is missing, and write the grid; its files, the page first."""
    cells = cells_of(plan.axes, plan.first)
    with enough_memory():
        paths, num_drawn = draw_cells(artist, networks, cells, plan.folder / "cells", plan.base)
    files = write_grid(Grid(plan.title, shared_notes(plan), plan.x, plan.y, plan.z, cells, paths), plan.folder)
    there = len(paths) - num_drawn
    logger.info("%s drawn, %d were there already: %s", counted(num_drawn, "picture"), there, files[0])
    return files
