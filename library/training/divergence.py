"""Steps whose gradients are no numbers: they are skipped, named and counted, and too many in a row end the run."""

import logging
import math
from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import gather_object
from torch import Tensor, nn

from library.errors import Diverged, counted, quoted_list
from library.families.base import Batch, ModelFamily
from library.options.groups import TrainNetworkOptions
from library.training.gradients import Gradients
from library.training.saving import SkipCount

logger = logging.getLogger(__name__)

MAX_NAMED = 5  # pictures in a sentence


def step_if_finite(
    optimizer: AcceleratedOptimizer, gradients: Gradients, accelerator: Accelerator, max_norm: float
) -> Tensor | bool:
    """Clip and take the optimizer's step, unless a gradient is no number; whether it was taken.

    A skipped step leaves weights and optimizer as they are to the bit. An optimizer that `decides_alone` does so on the
    device, and so the answer is there. For others the host waits for the norm of all gradients, and does not call them;
    it is the mean over processes and the same in each, so they decide alike. In fp16 the scaler does the same by
    itself, waits too, and lowers its scale.
    """
    if accelerator.scaler is None and getattr(optimizer.optimizer, "decides_alone", False):
        return optimizer.optimizer.step_if_finite(max_norm)
    norm = gradients.clip(accelerator, max_norm)
    if accelerator.scaler is None and not math.isfinite(norm.item()):
        return False
    optimizer.step()
    return accelerator.scaler is None or not optimizer.step_was_skipped


class SkippedSteps:
    """Says why steps were skipped, each reason once; Diverged after more than --max_skipped_steps in a row."""

    def __init__(self, options: TrainNetworkOptions, accelerator: Accelerator, count: SkipCount):
        self.limit, self.accelerator, self.rate_flag = options.max_skipped_steps, accelerator, rate_flag(options)
        self.count = count
        self.said: set[str] = set()

    def taken(self) -> None:
        """A step was taken."""
        self.count.in_a_row = 0

    def skipped(self, step: int, cause_here: Callable[[], str | None], loss_is_finite: bool) -> None:
        """Count a skipped step; `cause_here` tells what the batches of this process have to do with it.

        Where the loss is a number, the scaler of fp16 has only found its scale too high, which is no divergence.
        """
        scaler = self.accelerator.scaler
        if scaler is not None and all(gather_object([loss_is_finite])) and scaler.get_scale() >= 1:
            return
        causes = gather_object([cause_here()])
        why = next(filter(None, causes), f"try a lower {self.rate_flag}")
        self.count.in_a_row += 1
        self.count.total += 1
        if self.count.in_a_row > self.limit:
            steps = counted(self.count.in_a_row, "step")
            raise Diverged(
                f"the loss was no number (NaN or infinite) in {steps} in a row, the last of them step {step}; "
                f"none of them changed the network: {why}"
            )
        if why not in self.said:
            self.said.add(why)
            logger.warning("step %d was skipped, its loss or gradient is no number (NaN or infinite): %s", step, why)

    def report(self) -> None:
        """At the end, how many steps did nothing."""
        if self.count.total:
            logger.warning("%s skipped in this run, because the loss was no number", counted(self.count.total, "step"))


def is_whole(network: nn.Module, dtype: torch.dtype | None = None) -> bool:
    """Whether all weights are numbers in the format they are saved in; others are not saved, and older files stay."""
    weights = [weight if dtype is None else weight.to(dtype) for weight in network.parameters()]
    return bool(torch.stack([weight.isfinite().all() for weight in weights]).all())


def rate_flag(options: TrainNetworkOptions) -> str:
    """The learning rate that counts most."""
    return "--learning_rate" if options.unet_lr is None or options.network_train_text_encoder_only else "--unet_lr"


def likely_cause(
    family: ModelFamily, network: nn.Module, batches: Sequence[Batch], options: TrainNetworkOptions
) -> str | None:
    """Why the loss of these batches is no number, and what to do; None where nothing of them is at fault."""
    if not is_whole(network):
        return f"the network's weights are no numbers themselves; try a lower {rate_flag(options)}"
    for batch in batches:
        if found := bad_latents(family, batch) or bad_text(batch):
            return found
    if options.mixed_precision == "fp16":
        return "numbers grew too large for fp16; try --mixed_precision bf16, or a lower " + rate_flag(options)
    return None


@torch.no_grad()
def bad_latents(family: ModelFamily, batch: Batch) -> str | None:
    """A sentence where latents are no numbers, which names their pictures."""
    cached = batch.latents is not None
    latents = batch.latents if cached else family.vae.distribution(batch.images)[0]
    names = names_of(batch, latents)
    if not names:
        return None
    if cached:
        return f"the cached latents of {names} hold NaN; delete their files, and use --no_half_vae or another --vae"
    return f"the VAE makes NaN of {names}; use --no_half_vae, or another --vae"


def bad_text(batch: Batch) -> str | None:
    """A sentence where text encoder outputs out of files are no numbers."""
    for values in (batch.conds or {}).values():
        if names := names_of(batch, values):
            return f"the cached text encoder outputs of {names} hold NaN; delete their files and train again"
    return None


def names_of(batch: Batch, values: Tensor) -> str:
    """The pictures, or where they are not known the captions, of rows that are not finite."""
    is_finite = values.flatten(1).isfinite().all(dim=1).tolist()
    names = batch.pictures or batch.captions
    return quoted_list([name for name, finite in zip(names, is_finite, strict=True) if not finite], MAX_NAMED)
