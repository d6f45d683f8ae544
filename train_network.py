"""Train a LoRA or another adapter network for a Stable Diffusion model.

accelerate launch train_network.py --config_file my_lora.toml
"""

import logging
from functools import partial

from library.errors import UserError, run_script
from library.importing import quick_imports
from library.logs import start_logging
from library.options.cli import read_options
from library.options.groups import LoggingOptions, TrainNetworkOptions
from library.options.places import problems_in_place

logger = logging.getLogger(__name__)


def train(argv: list[str] | None = None, family: str | None = None) -> None:
    """Train as the options say; everything that can be wrong in them is found before torch is imported.

    The model's family is what the checkpoint says, which has to be `family` where that is given.
    """
    start_logging(LoggingOptions())  # for what is said of options while they are read
    options = read_options(TrainNetworkOptions, argv, partial(problems_elsewhere, family=family))
    with problems_in_place(options):
        train_as_asked(options, family)


def problems_elsewhere(options: TrainNetworkOptions, family: str | None) -> list[str]:
    """What is wrong with the files that the options name."""
    from library.preflight import problems_of_files  # all that looks at files, which --help does without

    return problems_of_files(options, family)


def train_as_asked(options: TrainNetworkOptions, family: str | None = None) -> None:
    """Check what the options name, say what will be done, and train."""
    from library.dataset.scan import unreadable_pictures
    from library.preflight import preflight
    from library.recipes.overview import show_overview
    from library.report import report

    start_logging(options)
    checked = preflight(options, family)
    report(options, checked)
    if options.dry_run:
        show_overview(checked)
        if checked.damaged:
            raise UserError(unreadable_pictures(checked.damaged))
    if options.debug_dataset:
        from library.recipes.debug_dataset import show_dataset  # numpy and OpenCV, but no torch

        show_dataset(options, checked)
    if options.dry_run:
        with quick_imports():
            from library.recipes.dry_run import measure  # torch, diffusers and transformers

        measure(options, checked)
    if options.dry_run or options.debug_dataset:
        return

    with quick_imports():
        from library.recipes.network import train_network  # torch, diffusers and transformers from here on

    train_network(options, checked)


if __name__ == "__main__":
    run_script(train)
