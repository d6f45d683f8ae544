"""How many steps a run takes, and how that comes about. Needs no torch."""

import os
from dataclasses import dataclass
from math import ceil

from library.errors import counted
from library.options.groups import LoopOptions, SavingOptions


@dataclass(frozen=True)
class StepPlan:
    """The arithmetic of a run; a batch is that of all processes together, steps are optimizer updates."""

    num_items: int  # pictures with their repeats, regularisation included
    batches_per_epoch: int
    num_processes: int
    accumulation: int
    num_epochs: int
    max_train_steps: int

    @property
    def steps_per_epoch(self) -> int:
        return ceil(self.batches_per_epoch / self.accumulation)

    def sentence(self, batch_sizes: list[int]) -> str:
        """The arithmetic spelled out: "24 pictures with repeats / batch size 1 = 24 batches an epoch; ..."."""
        batches = counted(self.batches_per_epoch, "batch", "batches")
        sizes = " and ".join(str(size) for size in dict.fromkeys(batch_sizes))
        shared = f" x {self.num_processes} processes" if self.num_processes > 1 else ""
        text = f"{counted(self.num_items, 'picture')} with repeats / batch size {sizes}{shared} = {batches}"
        if self.accumulation > 1:
            text += f" / accumulation {self.accumulation} = {counted(self.steps_per_epoch, 'step')}"
        return f"{text} an epoch; {counted(self.num_epochs, 'epoch')}, {counted(self.max_train_steps, 'step')} in all"


def num_processes() -> int:
    """Processes of this run, as accelerate launch or torchrun set them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this is the one process, or the first of several."""
    return os.environ.get("RANK", "0") == "0"


def step_plan(options: LoopOptions, num_items: int, batches_per_epoch: int, processes: int) -> StepPlan:
    """max_train_epochs decides where given, else max_train_steps; batches are those of all processes together."""
    accumulation = options.gradient_accumulation_steps
    steps_per_epoch = ceil(batches_per_epoch / accumulation)
    if options.max_train_epochs is not None:
        max_train_steps = options.max_train_epochs * steps_per_epoch
    else:
        max_train_steps = options.max_train_steps
    num_epochs = ceil(max_train_steps / steps_per_epoch)
    return StepPlan(num_items, batches_per_epoch, processes, accumulation, num_epochs, max_train_steps)


def save_every_n_epochs(options: SavingOptions, num_epochs: int) -> int | None:
    """--save_every_n_epochs, or what --save_n_epoch_ratio asks for."""
    if options.save_n_epoch_ratio:
        return num_epochs // options.save_n_epoch_ratio or 1
    return options.save_every_n_epochs
