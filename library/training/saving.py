"""Which files a run writes under which names, which it keeps, and its state for resuming."""

import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from pickle import PickleError
from textwrap import shorten

from accelerate import Accelerator
from torch.optim import Optimizer

from library.errors import UserError, quoted_list
from library.files import write_text_whole
from library.options.groups import SavingOptions
from library.texts import read_json

logger = logging.getLogger(__name__)

EXTENSIONS = {"safetensors": ".safetensors", "ckpt": ".ckpt", "pt": ".pt", None: ".safetensors"}
STATE_FILE = "train_state.json"


@dataclass
class LoopState:
    """Where a run stands: all counters are of work finished, and what a resumed run continues from."""

    epoch: int = 1  # the running epoch, 1-based
    step: int = 0  # optimizer steps
    batch: int = 0  # batches of the running epoch, in each process
    seed: int = 0  # of the order of the pictures and of what is drawn for each of them


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

    @staticmethod
    def state_of(checkpoint: Path) -> Path:
        """The state folder that belongs to a checkpoint."""
        return checkpoint.with_name(f"{checkpoint.stem}-state")


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


def remove_checkpoint(path: Path) -> None:
    if path.is_file():
        logger.info("removing the older %s", path.name)
        path.unlink()


def remove_state(path: Path) -> None:
    if path.is_dir():
        logger.info("removing the older %s", path.name)
        shutil.rmtree(path)


def save_state(accelerator: Accelerator, folder: Path, state: LoopState) -> None:
    """Write weights, optimizer, schedule, scaler and random generators; the folder appears whole."""
    unfinished = folder.with_name(f".{folder.name}-unfinished")
    if accelerator.is_main_process and unfinished.exists():
        shutil.rmtree(unfinished)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        facts = {
            "current_epoch": state.epoch,
            "current_step": state.step,
            "batch_in_epoch": state.batch,
            "seed": state.seed,
        }
        write_text_whole(unfinished / STATE_FILE, json.dumps(facts))
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(unfinished, folder)
        logger.info("state saved: %s", folder)


def read_state(folder: Path) -> LoopState:
    """The counters of a state folder."""
    try:
        facts = read_json((folder / STATE_FILE).read_text(encoding="utf-8"))
        epoch, step = facts["current_epoch"], facts["current_step"]
        counters = epoch, step, facts.get("batch_in_epoch", 0), facts.get("seed", 0)
        if not all(type(counter) is int and 0 <= counter < 2**63 for counter in counters):
            raise ValueError(f"{counters} are no counters")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--resume: {folder} is no whole state of a run: {STATE_FILE} is missing or broken") from error
    if "seed" not in facts:
        raise UserError(f"--resume: {folder} is a state of other scripts: {STATE_FILE} lacks the seed")
    return LoopState(epoch, step, facts.get("batch_in_epoch", 0), facts["seed"])


def load_state(accelerator: Accelerator, optimizer: Optimizer, folder: Path) -> None:
    """Take weights, optimizer, schedule and random generators from a state folder."""
    given = [dict(group) for group in optimizer.param_groups]
    try:
        accelerator.load_state(str(folder))
    except (OSError, ValueError, TypeError, AttributeError, LookupError, RuntimeError, EOFError, PickleError) as error:
        problem = f"the state in {folder} does not fit this run or is not whole"
        raise UserError(f"--resume: {problem}: {shorten(str(error), 300)}") from error
    if lacking := given[0].keys() - optimizer.param_groups[0].keys():
        problem = f"the state in {folder} is of another optimizer than --optimizer_type names"
        raise UserError(f"--resume: {problem}: it has no {quoted_list(sorted(lacking))}")
    for before, now in zip(given, optimizer.param_groups, strict=True):
        rates = [group.get("initial_lr", group["lr"]) for group in (before, now)]
        if rates[0] != rates[1]:
            logger.warning("--resume: training goes on at the state's learning rate, %s, not at %s", rates[1], rates[0])
            return
