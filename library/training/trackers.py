"""Where curves and sample pictures go: TensorBoard and wandb."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from PIL import Image

from library.errors import UserError, first_line
from library.options.derived import tracker_names
from library.options.fields import flags_of
from library.options.groups import LoggingOptions, TrainNetworkOptions
from library.secrets import redacted
from library.training.prompts import SamplePrompt
from library.training.tracker_checks import read_tracker_config

logger = logging.getLogger(__name__)

# Values of these are drawn over epochs, all others over steps.
EPOCH_TAGS = ("loss/epoch_average", "loss/validation/epoch_average", "loss/validation/epoch_divergence")

FINISH_SECONDS = 300.0  # to wait at the end for what wandb has still to upload; `wandb sync` can do it later


class Tracker:
    """One place for curves, as `Accelerator.log` writes to it; where it fails, this is said once, and it is silent."""

    name: str
    failed = False

    def log(self, values: dict[str, float], step: int | None = None) -> None:
        self._attempt(self.write_values, values, step)

    def log_samples(self, prompts: list[SamplePrompt], paths: list[Path], step: int) -> None:
        self._attempt(self.write_samples, prompts, paths, step)

    def log_options(self, values: dict[str, object]) -> None:
        self._attempt(self.write_options, values)

    def finish(self) -> None:
        self._attempt(self.close)

    def _attempt(self, write: Callable[..., None], *arguments: object) -> None:
        if self.failed:
            return
        try:
            write(*arguments)
        except Exception as error:  # whatever a tracker raises: a curve is not worth a run
            self.failed = True
            logger.warning("%s takes no more curves, and training goes on: %s", self.name, first_line(error))


class TensorBoard(Tracker):
    """Event files in `<logging_dir>/<run>/<project>`."""

    name = "tensorboard"

    def __init__(self, project: str, folder: Path | None, settings: dict):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / project), **settings)

    def write_values(self, values: dict[str, float], step: int | None) -> None:
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, step)
        self.writer.flush()

    def write_samples(self, prompts: list[SamplePrompt], paths: list[Path], step: int) -> None:
        for prompt, path in zip(prompts, paths, strict=True):
            pixels = np.asarray(Image.open(path))  # [H, W, 3]
            self.writer.add_image(f"sample_{prompt.enum}", pixels, step, dataformats="HWC")

    def write_options(self, values: dict[str, object]) -> None:
        self.writer.add_hparams(values, {})

    def close(self) -> None:
        self.writer.close()


class Wandb(Tracker):
    """A run on wandb, or kept in a folder where wandb is offline or out of reach.

    wandb's own step only counts calls and may not go back, so steps and epochs are values, and axes of the curves.
    """

    name = "wandb"

    def __init__(self, project: str, folder: Path | None, settings: dict):
        import wandb

        self.wandb = wandb
        settings = {"project": project, "dir": folder and str(folder)} | settings
        if "finish_timeout" in wandb.Settings.model_fields:  # by default it waits without end for a lost server
            settings["settings"] = {"finish_timeout": FINISH_SECONDS} | settings.get("settings", {})
        try:
            self.run = wandb.init(**settings)
        except wandb.Error as error:
            self.run = wandb.init(**settings | {"mode": "offline"})
            kept = Path(self.run.dir).parent
            logger.warning("wandb is out of reach (%s); `wandb sync %s` uploads the run later", first_line(error), kept)
        self.run.define_metric("*", step_metric="global_step")
        for tag in EPOCH_TAGS:
            self.run.define_metric(tag, step_metric="epoch")

    def write_values(self, values: dict[str, float], step: int | None) -> None:
        axis = "epoch" if values.keys() & set(EPOCH_TAGS) else "global_step"
        self.run.log({**values, axis: step})

    def write_samples(self, prompts: list[SamplePrompt], paths: list[Path], step: int) -> None:
        pictures = {
            f"sample_{prompt.enum}": self.wandb.Image(str(path), caption=prompt.prompt)
            for prompt, path in zip(prompts, paths, strict=True)
        }
        self.run.log({**pictures, "global_step": step})

    def write_options(self, values: dict[str, object]) -> None:
        self.run.config.update(values, allow_val_change=True)

    def close(self) -> None:
        self.run.finish()


TRACKERS = {"tensorboard": TensorBoard, "wandb": Wandb}


def start_trackers(accelerator: Accelerator, options: TrainNetworkOptions) -> None:
    """Give the accelerator of the main process its trackers; one that cannot start is named and left out."""
    if not accelerator.is_main_process:
        return
    folder = run_folder(options)
    if folder:
        folder.mkdir(parents=True, exist_ok=True)  # wandb only says that it misses it
    tables = read_tracker_config(options)
    for name in tracker_names(options):
        settings = tables.get(name, {})
        if name == "wandb" and options.wandb_run_name:
            settings["name"] = options.wandb_run_name
        try:
            with hidden_secrets():
                tracker = TRACKERS[name](options.log_tracker_name or "network_train", folder, settings)
        except Exception as error:  # whatever a tracker raises: a curve is not worth a run
            if isinstance(error, TypeError) and name in tables:
                raise UserError(f"--log_tracker_config: {name} does not take this: {first_line(error)}") from error
            logger.warning("%s cannot be started, and training goes on without it: %s", name, first_line(error))
            continue
        if options.log_config:
            tracker.log_options(loggable_options(options))
        accelerator.trackers.append(tracker)


def run_folder(options: LoggingOptions) -> Path | None:
    """`<logging_dir>/<log_prefix><time>`, a new one for every run."""
    if options.logging_dir is None:
        return None
    return Path(options.logging_dir) / f"{options.log_prefix or ''}{time.strftime('%Y%m%d%H%M%S')}"


@contextmanager
def hidden_secrets() -> Iterator[None]:
    """Without keys and tokens in `sys.argv`, which wandb keeps with the run."""
    argv, sys.argv = sys.argv, [redacted(text) for text in sys.argv]
    try:
        yield
    finally:
        sys.argv = argv


def loggable_options(options: TrainNetworkOptions) -> dict[str, object]:
    """The options for a tracker, without secrets and without paths, which tell of the user's computer."""
    flags = flags_of(type(options)).values()
    shown = [flag.name for flag in flags if flag.kind != "path" and not flag.is_secret]
    values = {name: getattr(options, name) for name in shown}
    return {name: v if isinstance(v, int | float | str) else str(v) for name, v in values.items()}
