"""The training loop: batches, accumulation, clipping, and when to save, sample and log."""

import logging
import os
from collections.abc import Iterator
from typing import Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from library.dataset.dataset import TrainingDataset, collate
from library.dataset.sampler import BucketSampler, Draw
from library.errors import UserError
from library.families.base import Batch
from library.options.groups import TrainNetworkOptions
from library.training.plan import StepPlan
from library.training.saving import LoopState

logger = logging.getLogger(__name__)


class Recipe(Protocol):
    """What a script trains, as the loop sees it."""

    def loss(self, batch: Batch) -> Tensor: ...  # scalar

    def parameters(self) -> list[nn.Parameter]: ...

    def learning_rates(self) -> dict[str, float]: ...  # for the log, by group

    def metrics(self) -> dict[str, float]: ...  # more values for the log; asked for only where there is one

    def training_mode(self) -> None: ...

    def weights_updated(self) -> None: ...  # what follows an optimizer step at once, before anything is logged or saved

    def step_finished(self, state: LoopState) -> None: ...  # saves and samples that are due

    def epoch_finished(self, state: LoopState) -> None: ...


class ShardedBatches:
    """The batches of a sampler that fall to this process; every process gets equally many."""

    def __init__(self, sampler: BucketSampler, num_processes: int, rank: int):
        self.sampler, self.num_processes, self.rank = sampler, num_processes, rank
        self.start = 0  # batches of this process to leave out of the epoch; a DataLoader may iterate twice

    def __len__(self) -> int:
        return -(-len(self.sampler) // self.num_processes)

    def __iter__(self) -> Iterator[list[Draw]]:
        batches = list(self.sampler)
        padding = len(self) * self.num_processes - len(batches)
        mine = (batches + batches[:padding])[self.rank :: self.num_processes]
        return iter(mine[self.start :])


class LossRecorder:
    """The last loss and the mean over one epoch's batches; losses are read one step late, so nothing waits."""

    def __init__(self, window: int):
        self.window = window
        self.losses: list[float] = []
        self._pending: Tensor | None = None

    def add(self, loss: Tensor) -> None:
        self.settle()
        self._pending = loss.detach()

    def settle(self) -> None:
        """Read the loss that is still on its way."""
        if self._pending is not None:
            self.losses.append(self._pending.item())
            self._pending = None
            del self.losses[: -self.window]

    @property
    def current(self) -> float | None:
        return self.losses[-1] if self.losses else None

    @property
    def average(self) -> float | None:
        return sum(self.losses) / len(self.losses) if self.losses else None


def build_loader(
    dataset: TrainingDataset, batches: ShardedBatches, options: TrainNetworkOptions, device: torch.device
) -> DataLoader:
    """Workers only prefetch: what they give depends on the draws alone, so their number changes no result.

    With cached latents there is nothing to wait for, and starting workers (on Windows each imports torch) costs more.
    """
    cached = dataset.latents or dataset.latents_paths
    num_workers = 0 if cached else min(options.max_data_loader_n_workers, os.cpu_count() or 1)
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=num_workers,
        persistent_workers=options.persistent_data_loader_workers and num_workers > 0,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # its own, so that starting an epoch draws nothing from training's
    )


def run(
    recipe: Recipe,
    dataset: TrainingDataset,
    sampler: BucketSampler,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    accelerator: Accelerator,
    options: TrainNetworkOptions,
    plan: StepPlan,
    state: LoopState,
) -> LoopState:
    """Train from `state` to the end of the plan; returns where it ended."""
    batches = ShardedBatches(sampler, accelerator.num_processes, accelerator.process_index)
    loader = build_loader(dataset, batches, options, accelerator.device)
    losses = LossRecorder(plan.batches_per_process)
    bar = tqdm(
        total=plan.max_train_steps,
        initial=state.step,
        desc="steps",
        disable=not accelerator.is_local_main_process,
        smoothing=0.1,
    )
    while state.step < plan.max_train_steps:
        sampler.set_epoch(state.epoch)
        batches.start = state.batch
        for batch in batches_of(loader):
            recipe.training_mode()
            loss = recipe.loss(batch.to(accelerator.device))
            accelerator.backward(loss / plan.accumulation)
            state.batch += 1
            losses.add(loss)
            if state.batch % plan.accumulation and state.batch < plan.batches_per_process:
                continue
            update(recipe.parameters(), optimizer, scheduler, accelerator, options.max_grad_norm)
            recipe.weights_updated()
            state.step += 1
            bar.update()
            log_step(recipe, losses, bar, accelerator, state)
            recipe.step_finished(state)
            if state.step >= plan.max_train_steps:
                break
        losses.settle()
        accelerator.log({"loss/epoch_average": losses.average or 0.0}, step=state.epoch)
        recipe.epoch_finished(state)
        state.epoch, state.batch = state.epoch + 1, 0
    bar.close()
    state.epoch -= 1
    return state


def batches_of(loader: DataLoader) -> Iterator[Batch]:
    """The loader's batches; a mistake found in a worker keeps its own sentence."""
    try:
        yield from loader
    except UserError as error:
        raise UserError(str(error).strip().splitlines()[-1].split("UserError: ")[-1]) from error


def update(
    parameters: list[nn.Parameter],
    optimizer: Optimizer,
    scheduler: LRScheduler,
    accelerator: Accelerator,
    max_grad_norm: float,
) -> None:
    """One optimizer step on gradients averaged over processes and clipped."""
    if accelerator.num_processes > 1:
        average_gradients(parameters, accelerator)
    if max_grad_norm:
        accelerator.clip_grad_norm_(parameters, max_grad_norm)
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad(set_to_none=True)


def average_gradients(parameters: list[nn.Parameter], accelerator: Accelerator) -> None:
    """The mean over processes, in one message; where a process has no gradient (a dropped layer), its part is 0."""
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    mean = accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), reduction="mean")
    for parameter, part in zip(parameters, mean.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)


def log_step(recipe: Recipe, losses: LossRecorder, bar: tqdm, accelerator: Accelerator, state: LoopState) -> None:
    """The trackers where there are any, and the bar; without trackers nothing waits for this step's loss."""
    if accelerator.trackers:
        losses.settle()
        values = {"loss/current": losses.current, "loss/average": losses.average}
        rates = {f"lr/{name}": rate for name, rate in recipe.learning_rates().items()}
        accelerator.log(values | rates | recipe.metrics(), step=state.step)
    if losses.average is not None:
        bar.set_postfix(avr_loss=f"{losses.average:.4f}", refresh=False)
