"""The training loop: batches, accumulation, clipping, and when to save, sample and log."""

import logging
import math
from functools import partial
from typing import NoReturn, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm.auto import tqdm

from library.dataset.dataset import TrainingDataset
from library.dataset.loader import SharedBatches, batches_of, build_loader
from library.dataset.sampler import BucketSampler
from library.families.base import Batch
from library.options.groups import TrainNetworkOptions
from library.training.divergence import SkippedSteps, step_if_finite
from library.training.losses import LossRecorder
from library.training.memory_errors import memory_for_step
from library.training.plan import StepPlan
from library.training.saving import LoopState
from library.training.stopping import StopRequest
from library.training.validation import Validation

logger = logging.getLogger(__name__)


class Recipe(Protocol):
    """What a script trains, as the loop sees it."""

    def loss(self, batch: Batch) -> Tensor: ...  # scalar

    def validation_losses(self, batch: Batch, timesteps: list[int]) -> Tensor: ...  # [T, B]

    def parameters(self) -> list[nn.Parameter]: ...

    def learning_rates(self) -> dict[str, float]: ...  # for the log, by group

    def metrics(self) -> dict[str, float]: ...  # more values for the log; asked for only where there is one

    def training_mode(self) -> None: ...

    def resting_mode(self) -> None: ...  # as the network is saved, sampled and validated

    def weights_updated(self) -> None: ...  # what follows an optimizer step at once, before anything is logged or saved

    def cause_of_nan(self, batches: list[Batch]) -> str | None: ...  # of a step that was skipped; None is unknown

    def step_finished(self, state: LoopState) -> None: ...  # saves and samples that are due

    def epoch_finished(self, state: LoopState) -> None: ...

    def stop(self, state: LoopState, cause: str) -> NoReturn: ...  # saves, and raises Stopped


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
    validation: Validation | None = None,
    stop: StopRequest | None = None,
) -> LoopState:
    """Train from `state` to the end of the plan, or to a request to stop; returns where it ended."""
    batches = SharedBatches(sampler, accelerator.num_processes, accelerator.process_index)
    loader = build_loader(dataset, batches, options, accelerator.device)
    losses = state.losses
    losses.window = plan.batches_per_epoch
    skipped = SkippedSteps(options, accelerator, state.skipped)
    bar = tqdm(
        total=plan.max_train_steps,
        initial=state.step,
        desc="steps",
        disable=not accelerator.is_local_main_process,
        smoothing=0.1,
    )
    while True:
        sampler.set_epoch(state.epoch)
        batches.start = state.batch
        of_step: list[Batch] = []
        for batch in batches_of(loader) if state.step < plan.max_train_steps else ():
            recipe.training_mode()
            with memory_for_step(batch, state.step + 1, options):
                loss = recipe.loss(batch.to(accelerator.device)) * batch.share.weight
                accelerator.backward(loss / plan.accumulation)
            state.batch += 1
            of_step.append(batch)
            losses.add(accelerator.reduce(loss.detach(), "mean"))
            if state.batch % plan.accumulation and state.batch < plan.batches_per_epoch:
                continue
            with memory_for_step(batch, state.step + 1, options):
                taken = update(recipe.parameters(), optimizer, scheduler, accelerator, options.max_grad_norm, losses)
            if taken:
                recipe.weights_updated()
                skipped.taken()
            else:
                skipped.skipped(state.step + 1, partial(recipe.cause_of_nan, of_step), losses.last_are_finite)
            of_step = []
            state.step += 1
            bar.update()
            log_step(recipe, losses, bar, accelerator, state)
            recipe.step_finished(state)
            if validation and validation.due_at_step(state.step):
                validate(recipe, validation, losses, accelerator, "step", state.step)
            if state.step >= plan.max_train_steps:
                break
            if stop and (cause := stop.asked()):
                bar.close()
                recipe.stop(state, cause)
        losses.settle()
        accelerator.log({"loss/epoch_average": losses.average or 0.0}, step=state.epoch)
        if validation and validation.due_at_epoch(state.epoch):
            validate(recipe, validation, losses, accelerator, "epoch", state.epoch)
        state.epoch_finished = True
        recipe.epoch_finished(state)
        if state.step >= plan.max_train_steps:  # the place stays, for a longer run to go on from
            break
        state.epoch, state.batch, state.epoch_finished = state.epoch + 1, 0, False
    bar.close()
    skipped.report()
    return state


def update(
    parameters: list[nn.Parameter],
    optimizer: Optimizer,
    scheduler: LRScheduler,
    accelerator: Accelerator,
    max_grad_norm: float,
    losses: LossRecorder,
) -> bool:
    """One optimizer step on gradients averaged over processes and clipped; whether it was taken, not skipped."""
    if accelerator.num_processes > 1:
        average_gradients(parameters, accelerator)
    norm = accelerator.clip_grad_norm_(parameters, max_grad_norm or math.inf)
    losses.settle()  # the one wait for the device in a step; the norm is read behind it
    taken = step_if_finite(optimizer, norm, accelerator)
    scheduler.step()
    optimizer.zero_grad(set_to_none=True)
    return taken


def average_gradients(parameters: list[nn.Parameter], accelerator: Accelerator) -> None:
    """The mean over processes, in one message, which also says who has gradients.

    Where a process has none (a dropped layer), its part is 0; where no process has one there is none, as with one
    process: optimizers leave such parameters alone.
    """
    is_here = [parameter.grad is not None for parameter in parameters]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flags = torch.tensor(is_here).to(gradients[0], non_blocking=True)
    mean = accelerator.reduce(torch.cat([*(gradient.flatten() for gradient in gradients), flags]), reduction="mean")
    *parts, flags = mean.split([*(p.numel() for p in parameters), len(parameters)])
    is_anywhere = is_here if all(is_here) else flags.tolist()  # only then the device is waited for
    for parameter, part, is_there in zip(parameters, parts, is_anywhere, strict=True):
        parameter.grad = part.view_as(parameter) if is_there else None


def log_step(recipe: Recipe, losses: LossRecorder, bar: tqdm, accelerator: Accelerator, state: LoopState) -> None:
    """The trackers where there are any, and the bar."""
    average = losses.average  # of up to all batches of an epoch
    if accelerator.trackers:
        values = {"loss/current": losses.current, "loss/average": average} if losses.last_are_finite else {}
        rates = {f"lr/{name}": rate for name, rate in recipe.learning_rates().items()}
        accelerator.log(values | rates | recipe.metrics(), step=state.step)
    if average is not None:
        bar.set_postfix(avr_loss=f"{average:.4f}", refresh=False)


def validate(
    recipe: Recipe, validation: Validation, losses: LossRecorder, accelerator: Accelerator, unit: str, count: int
) -> None:
    """The loss on held-out pictures, and how far it is above that of training, said and logged."""
    losses.settle()
    loss, trained = validation.loss(recipe), math.nan if losses.average is None else losses.average
    logger.info("%s %d: validation loss %.4f, training loss %.4f", unit, count, loss, trained)
    values = {f"loss/validation/{unit}_average": loss, f"loss/validation/{unit}_divergence": loss - trained}
    accelerator.log(values, step=count)
