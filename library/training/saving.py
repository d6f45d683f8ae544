"""Which files a run writes under which names, which it keeps, and its state for resuming. Needs no torch."""

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from library.files import remove_folder
from library.options.groups import SavingOptions
from library.training.losses import Curves, LossRecorder

logger = logging.getLogger(__name__)

EXTENSIONS = {"safetensors": ".safetensors", "ckpt": ".ckpt", "pt": ".pt", None: ".safetensors"}
STATE_FILE = "train_state.json"


@dataclass
class SkipCount:
    """Steps that were skipped: in a row by now, and in all."""

    in_a_row: int = 0
    total: int = 0


@dataclass
class LoopState:
    """Where a run stands: all counters are of work finished, and what a resumed run continues from."""

    epoch: int = 1  # the running epoch, 1-based
    step: int = 0  # optimizer steps
    batch: int = 0  # batches of the running epoch, each of all processes together
    seed: int = 0  # of the order of the pictures and of what is drawn for each of them
    epoch_finished: bool = False  # whether what follows an epoch's last step is done too
    stops: list[int] = field(default_factory=list)  # steps where the run was stopped and left files
    losses: LossRecorder = field(default_factory=LossRecorder)
    skipped: SkipCount = field(default_factory=SkipCount)
    curves: Curves = field(default_factory=Curves, compare=False, repr=False)  # of the whole run, for its record
    has_learned: bool = field(default=False, compare=False)  # whether a step of this run was taken
    settle: Callable[[], object] = field(default=bool, compare=False, repr=False)  # waits for steps under way

    def facts(self) -> dict[str, Any]:
        """What is kept of it, under kohya's names where there are any."""
        self.settle()
        return {
            "current_epoch": self.epoch,
            "current_step": self.step,
            "batch_in_epoch": self.batch,
            "epoch_finished": self.epoch_finished,
            "seed": self.seed,
            "stops": self.stops,
            "losses": self.losses.losses,
            "skipped": [self.skipped.in_a_row, self.skipped.total],
            "curves": self.curves.kept(),
        }


class OutputNames:
    """The names of checkpoints and states, as kohya gives them."""

    def __init__(self, options: SavingOptions):
        self.folder = Path(options.output_dir)
        self.name = options.output_name
        self.extension = EXTENSIONS[options.save_model_as]

    def epoch(self, epoch: int) -> Path:
        return self.folder / f"{self.name or 'epoch'}-{epoch:06d}{self.extension}"

    def step(self, step: int) -> Path:
        return self.folder / f"{self.name or 'at'}-step{step:08d}{self.extension}"

    def final(self) -> Path:
        return self.folder / f"{self.name or 'last'}{self.extension}"

    def record(self) -> Path:
        """The record of the run; front ends keep notes of their own in NAME.json."""
        return self.folder / f"{self.name or 'last'}-run.json"

    @staticmethod
    def state_of(checkpoint: Path) -> Path:
        """The state folder that belongs to a checkpoint."""
        return checkpoint.with_name(f"{checkpoint.stem}-state")

    def is_state(self, name: str) -> bool:
        """Whether a folder of this name is a state of this run."""
        epoch, step, final = (re.escape(self.name or default) for default in ("epoch", "at", "last"))
        return re.fullmatch(rf"({epoch}-\d+|{step}-step\d+|{final})-state", name) is not None


def epoch_to_remove(epoch: int, every: int, keep: int | None) -> int | None:
    """The epoch whose checkpoint goes when this one was written, None where all stay."""
    if not keep:
        return None
    gone = epoch - every * keep
    return gone if gone > 0 else None


def step_to_remove(step: int, every: int, keep: int | None) -> int | None:
    """The step whose checkpoint goes: those older than `keep` steps do."""
    if not keep:
        return None
    gone = step - keep - 1
    gone -= gone % every
    return gone if gone > 0 else None


def stop_to_remove(stop: int, step: int, every: int, keep: int | None) -> int | None:
    """The step of a stop whose files go: as those of `step_to_remove`, when a later step was written."""
    return stop if keep and stop < step - keep else None


def remove_checkpoint(path: Path) -> None:
    if path.is_file():
        logger.info("removing the older %s", path.name)
        path.unlink()


def remove_state(path: Path) -> None:
    if path.is_dir():
        logger.info("removing the older %s", path.name)
        remove_folder(path)
