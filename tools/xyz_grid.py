"""Draw a table of pictures that shows which epoch, and which strength, is best.

python tools/xyz_grid.py --run output/my_lora
"""

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.errors import run_script
from library.generating.grid_options import GridOptions
from library.importing import quick_imports
from library.logs import start_logging
from library.options.cli import read_options
from library.options.groups import LoggingOptions

logger = logging.getLogger(__name__)

OPTIONS = GridOptions


def main(argv: list[str] | None = None) -> None:
    options = read_options(OPTIONS, argv)
    start_logging(LoggingOptions())
    from library.generating.grid_options import plan_grid

    plan = plan_grid(options)
    with quick_imports():
        from library.generating.grid_recipe import draw_grid

    draw_grid(plan)


if __name__ == "__main__":
    run_script(main)
