"""What the trackers of a run need: their packages, settings and keys. Needs no torch."""

import importlib.util
import os
from pathlib import Path

from library.errors import UserError, first_line
from library.files import read_user_text
from library.options.config_file import parse_toml
from library.options.derived import tracker_names
from library.options.groups import LoggingOptions
from library.secrets import hide_in

PACKAGES = {
    "tensorboard": "pip install tensorboard",
    "wandb": "python tools/install.py --trackers, or pip install wandb",
}


def check_trackers(options: LoggingOptions) -> None:
    """UserError where a tracker's package, settings or key are missing."""
    names = tracker_names(options)
    missing = [name for name in names if not is_installed(name)]
    problems = [f"--log_with {name} needs the package {name}: {PACKAGES[name]}" for name in missing]
    if problems:
        raise UserError(*problems)
    read_tracker_config(options)
    if "wandb" in names:
        log_in_to_wandb(options)


def is_installed(name: str) -> bool:
    """Whether there is such a package; a folder `wandb` that holds runs has no origin."""
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None


def read_tracker_config(options: LoggingOptions) -> dict[str, dict]:
    """The tables of --log_tracker_config by the name of their tracker: what it is started with."""
    path = options.log_tracker_config
    if not path:
        return {}
    place = f"--log_tracker_config: {path}"
    tables = parse_toml(place, read_user_text(Path(path), place))
    problems = [
        f"--log_tracker_config: {path} must hold tables named [{'] or ['.join(PACKAGES)}], found {name}"
        for name, table in tables.items()
        if name not in PACKAGES or not isinstance(table, dict)
    ]
    if problems:
        raise UserError(*problems)
    hide_in(tables)
    return tables


def log_in_to_wandb(options: LoggingOptions) -> None:
    """Have wandb find its key now, asking for it where there is a terminal; with the flag, nothing is stored."""
    import wandb

    if options.wandb_api_key:
        os.environ["WANDB_API_KEY"] = options.wandb_api_key
    if wandb.setup().settings.mode != "online":
        return
    try:
        wandb.login(verify=False)
    except (wandb.Error, ValueError) as error:  # a key of the wrong length is a ValueError
        raise UserError(
            f"--log_with wandb: {first_line(error)}; give --wandb_api_key or run `wandb login` once, "
            "or set WANDB_MODE=offline to keep the run on this computer"
        ) from error
