"""The training loop: batches, accumulation, clipping, and when to save, sample and log."""

import logging
import math
from collections.abc import Callable
from typing import NoReturn, Protocol

from accelerate import Accelerator
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm.auto import tqdm

from library.dataset.dataset import TrainingDataset
from library.dataset.loader import SharedBatches, batches_of, build_loader
from library.dataset.sampler import BucketSampler
from library.families.base import Batch
from library.options.groups import TrainNetworkOptions
from library.training.divergence import SkippedSteps, step_if_finite
from library.training.gradients import Gradients
from library.training.host_copy import HostCopy
from library.training.memory_errors import memory_for_step
from library.training.outcomes import Outcomes
from library.training.plan import StepPlan
from library.training.saving import LoopState
from library.training.stopping import StopRequest
from library.training.validation import Validation

logger = logging.getLogger(__name__)


class Recipe(Protocol):
    """What a script trains, as the loop sees it."""

    def backward(self, batch: Batch, accumulation: int) -> Tensor: ...  # adds gradients; the loss times the share

    def validation_losses(self, batch: Batch, timesteps: list[int]) -> Tensor: ...  # [T, B]

    def gradients(self) -> Gradients: ...

    def learning_rates(self) -> dict[str, float]: ...  # for the log, by group

    def metrics(self) -> Callable[[], dict[str, float]]: ...  # more values for the log; reading them may wait

    def training_mode(self) -> None: ...

    def resting_mode(self) -> None: ...  # as the network is saved, sampled and validated

    def weights_updated(
        self, taken: Tensor | bool
    ) -> None: ...  # what follows an optimizer step at once, with its gradients

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
    state.losses.window = plan.batches_per_epoch
    gradients = recipe.gradients()
    bar = tqdm(
        total=plan.max_train_steps,
        initial=state.step,
        desc="steps",
        disable=not accelerator.is_local_main_process,
        smoothing=0.1,
    )
    skipped = SkippedSteps(options, accelerator, state.skipped)
    outcomes = Outcomes(recipe, skipped, bar, accelerator, state)
    state.settle = outcomes.settle
    with bar:
        while True:
            sampler.set_epoch(state.epoch)
            batches.start = state.batch
            of_step: list[Batch] = []
            losses: list[HostCopy] = []
            for batch in batches_of(loader) if state.step < plan.max_train_steps else ():
                recipe.training_mode()
                if not of_step:
                    gradients.begin()
                with memory_for_step(batch, state.step + 1, options):
                    loss = recipe.backward(batch.to(accelerator.device), plan.accumulation)
                    gradients.collect()
                state.batch += 1
                of_step.append(batch)
                losses.append(HostCopy(accelerator.reduce(loss, "mean")))
                if state.batch % plan.accumulation and state.batch < plan.batches_per_epoch:
                    continue
                with memory_for_step(batch, state.step + 1, options):
                    taken = update(gradients, optimizer, scheduler, accelerator, options.max_grad_norm)
                recipe.weights_updated(taken)
                gradients.clear()
                state.step += 1
                bar.update()
                outcomes.add(state.step, of_step, losses, taken)
                of_step, losses = [], []
                recipe.step_finished(state)
                if validation and validation.due_at_step(state.step):
                    validate(recipe, validation, state, accelerator, "step", state.step)
                if state.step >= plan.max_train_steps:
                    break
                if stop and (cause := stop.asked()):
                    bar.close()
                    recipe.stop(state, cause)
            outcomes.settle()
            accelerator.log({"loss/epoch_average": state.losses.average or 0.0}, step=state.epoch)
            if validation and validation.due_at_epoch(state.epoch):
                validate(recipe, validation, state, accelerator, "epoch", state.epoch)
            state.epoch_finished = True
            recipe.epoch_finished(state)
            if state.step >= plan.max_train_steps:  # the place stays, for a longer run to go on from
                break
            state.epoch, state.batch, state.epoch_finished = state.epoch + 1, 0, False
    skipped.report()
    return state


def update(
    gradients: Gradients, optimizer: Optimizer, scheduler: LRScheduler, accelerator: Accelerator, max_grad_norm: float
) -> Tensor | bool:
    """One optimizer step on gradients averaged over processes and clipped; whether it was taken, not skipped.

    The gradients stay until they are cleared.
    """
    if accelerator.num_processes > 1:
        gradients.average(accelerator)
    taken = step_if_finite(optimizer, gradients, accelerator, max_grad_norm)
    scheduler.step()
    return taken


def validate(
    recipe: Recipe, validation: Validation, state: LoopState, accelerator: Accelerator, unit: str, count: int
) -> None:
    """The loss on held-out pictures, and how far it is above that of training, said and logged."""
    state.settle()
    average = state.losses.average
    loss, trained = validation.loss(recipe), math.nan if average is None else average
    logger.info("%s %d: validation loss %.4f, training loss %.4f", unit, count, loss, trained)
    values = {f"loss/validation/{unit}_average": loss, f"loss/validation/{unit}_divergence": loss - trained}
    state.curves.add("validation loss", state.step, loss)
    accelerator.log(values, step=count)
