"""The loss of a batch and its gradients: drawing noise, asking the model, and the backward pass."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from library.families.base import Batch, ModelFamily
from library.options.groups import TrainNetworkOptions
from library.training.denoising import Ddpm, Question, denoising_loss, losses_of, question_of
from library.training.gradients import flat_of
from library.training.randomness import TrainingRandomness
from library.training.step_capture import CapturedSteps, why_not_captured


class ForwardBackward:
    """What a run does with its batches."""

    def __init__(self, family: ModelFamily, network: nn.Module, accelerator: Accelerator, options: TrainNetworkOptions):
        self.family, self.network, self.accelerator = family, network, accelerator
        self.loss_type = options.loss_type
        self.objective = Ddpm(options, v_prediction=family.v_prediction, device=accelerator.device)
        self.randomness = TrainingRandomness(accelerator.device, accelerator.process_index)
        self.captured = None
        if options.cuda_graphs and not why_not_captured(options, family, flat_of(network), accelerator.device):
            self.captured = CapturedSteps(self._backward)

    def backward(self, batch: Batch, accumulation: int) -> Tensor:
        """Add the gradients of the batch's loss over `accumulation`, and of the network's penalty; returns the loss.

        The penalty is no part of what is returned, so that losses of different networks compare.
        """
        with self.accelerator.autocast():
            randomness = self.randomness.begin(batch.share)
            question = question_of(self.family, self.objective, batch, None, self.network_off, randomness)
        share = batch.share.weight / accumulation
        if share != 1:
            question = replace(question, weights=question.weights * share)
        loss = self.captured(question) if self.captured else self._backward(question)
        if (penalty := self.network.penalty()) is not None:
            self.accelerator.backward(penalty / accumulation)
        return loss * accumulation

    def _backward(self, question: Question) -> Tensor:
        with self.accelerator.autocast():
            loss = losses_of(self.family, question, self.loss_type).mean()
        self.accelerator.backward(loss)
        return loss.detach()

    def losses(self, batch: Batch, timesteps: list[int]) -> Tensor:
        """The loss of each sample at each timestep, [T, B], with torch's own random numbers."""
        if batch.latents is None:
            batch = replace(batch, images=None, latents=self.family.vae.encode(batch.images))
        count, device = len(batch.captions), self.accelerator.device
        with self.accelerator.autocast():
            return torch.stack([self._losses(batch, torch.full((count,), t, device=device)) for t in timesteps])

    def _losses(self, batch: Batch, timesteps: Tensor) -> Tensor:
        return denoising_loss(self.family, self.objective, batch, timesteps, network_off=self.network_off)

    @contextmanager
    def network_off(self) -> Iterator[None]:
        """The base model as it is without the network."""
        self.network.set_multiplier(0.0)
        try:
            yield
        finally:
            self.network.set_multiplier(1.0)
