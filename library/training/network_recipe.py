"""What the loop asks of a run that trains an adapter network: its loss, and what to write when."""

import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from library.errors import CannotWrite, Stopped
from library.families.base import Batch, ModelFamily
from library.options.derived import caches_latents
from library.options.groups import TrainNetworkOptions
from library.pictures import write_picture
from library.training import saving
from library.training.denoising import TORCHS_OWN, Ddpm, denoising_loss
from library.training.divergence import is_whole, likely_cause
from library.training.hub import Uploads
from library.training.metadata import TrainingMetadata
from library.training.optimizers import OptimizerSpec
from library.training.plan import StepPlan, save_every_n_epochs
from library.training.precision import save_dtype
from library.training.prompts import SamplePrompt
from library.training.randomness import BatchRandomness, TrainingRandomness
from library.training.record import StepTimes
from library.training.rescue import previews_may_fail
from library.training.resuming import made_with
from library.training.sampling import before_after_sheet, save_samples
from library.training.saving import LoopState, OutputNames
from library.training.schedule_free import TwoWeights

logger = logging.getLogger(__name__)


class NetworkRecipe:
    """What the loop asks of a run that trains a network: its loss, and what to write when."""

    def __init__(
        self,
        family: ModelFamily,
        network: nn.Module,
        optimizer: Optimizer,
        spec: OptimizerSpec,
        groups: list[dict],
        accelerator: Accelerator,
        options: TrainNetworkOptions,
        metadata: TrainingMetadata,
        prompts: list[SamplePrompt],
        plan: StepPlan,
    ):
        self.family, self.network, self.optimizer, self.spec = family, network, optimizer, spec
        self.accelerator, self.options, self.metadata = accelerator, options, metadata
        self.prompts, self.plan = prompts, plan
        self.objective = Ddpm(options, v_prediction=family.v_prediction, device=accelerator.device)
        self.randomness = TrainingRandomness(accelerator.device, accelerator.process_index)
        self.names = OutputNames(options)
        self.uploads = Uploads(options) if options.huggingface_repo_id else None
        self.group_names = [group["name"] for group in groups]
        self.weights = TwoWeights(optimizer) if spec.schedule_free else None
        self.has_learned = False  # in this run
        self.limited_norms = None  # those of the last step, with --scale_weight_norms
        self.every_n_epochs = save_every_n_epochs(options, self.plan.num_epochs)
        self.step_times = StepTimes()

    def loss(self, batch: Batch) -> Tensor:
        return self._losses(batch, randomness=self.randomness.begin(batch.share)).mean()

    def validation_losses(self, batch: Batch, timesteps: list[int]) -> Tensor:
        """The loss of each sample at each timestep, [T, B]."""
        if batch.latents is None:
            batch = replace(batch, images=None, latents=self.family.vae.encode(batch.images))
        count = len(batch.captions)
        return torch.stack(
            [self._losses(batch, torch.full((count,), t, device=self.accelerator.device)) for t in timesteps]
        )

    def _losses(
        self, batch: Batch, timesteps: Tensor | None = None, randomness: BatchRandomness = TORCHS_OWN
    ) -> Tensor:
        with self.accelerator.autocast():
            return denoising_loss(self.family, self.objective, batch, timesteps, self.network_off, randomness)

    @contextmanager
    def network_off(self) -> Iterator[None]:
        """The base model as it is without the network."""
        self.network.set_multiplier(0.0)
        try:
            yield
        finally:
            self.network.set_multiplier(1.0)

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def learning_rates(self) -> dict[str, float]:
        rates = {}
        for name, group in zip(self.group_names, self.optimizer.param_groups, strict=True):
            rates[name] = group["lr"]
            if "d" in group:  # D-Adaptation, Prodigy and their kin, of whatever package
                rates[f"d*lr/{name}"] = group["d"] * group["lr"]
        return rates

    def weights_updated(self) -> None:
        self.has_learned = True
        if self.options.scale_weight_norms:
            self.limited_norms = self.network.limit_norms(self.options.scale_weight_norms)

    def metrics(self) -> dict[str, float]:
        return self.limited_norms.logged() if self.limited_norms else {}

    def cause_of_nan(self, batches: list[Batch]) -> str | None:
        return likely_cause(self.family, self.network, batches, self.options)

    def keep(self, state: LoopState) -> None:
        """Save the network as a step's, where it has learned, is whole and not saved yet, as a run ends too early."""
        path = self.names.step(state.step)
        if self.has_learned and not path.exists() and is_whole(self.network):
            self.save(path, state, epoch=state.epoch - 1, with_state=False)

    def training_mode(self) -> None:
        if not self.network.training:  # it takes milliseconds, and is asked for before every batch
            self.network.train()
        if self.weights:
            self.weights.train()

    def resting_mode(self) -> None:
        """As the network is saved and sampled: no dropout, and a schedule-free optimizer's averaged weights."""
        self.step_times.interrupted()
        self.network.eval()
        if self.weights:
            self.weights.average()

    def step_finished(self, state: LoopState) -> None:
        self.step_times.step_finished()
        options = self.options
        if options.sample_every_n_epochs is None and due(options.sample_every_n_steps, state.step):
            self.sample(f"{state.step:06d}", state.step)
        every = options.save_every_n_steps
        if due(every, state.step) and self.saved(self.names.step(state.step), state, epoch=state.epoch - 1):
            self.remove_old_steps(state)

    def epoch_finished(self, state: LoopState) -> None:
        if due(self.options.sample_every_n_epochs, state.epoch):
            self.sample(f"e{state.epoch:06d}", state.step)
        is_due = due(self.every_n_epochs, state.epoch) and state.epoch < self.plan.num_epochs
        if is_due and self.saved(self.names.epoch(state.epoch), state, epoch=state.epoch):
            self.remove_old_epochs(state.epoch)

    def remove_old_steps(self, state: LoopState) -> None:
        """Remove what --save_last_n_steps keeps no longer at the last step that was saved."""
        every = self.options.save_every_n_steps
        last = state.step - state.step % every
        self.remove(self.names.step, saving.step_to_remove, last, every, "steps")
        for stop in state.stops:
            self.remove(self.names.step, partial(saving.stop_to_remove, stop), last, every, "steps")

    def remove_old_epochs(self, epoch: int) -> None:
        self.remove(self.names.epoch, saving.epoch_to_remove, epoch, self.every_n_epochs, "epochs")

    def remove_leftovers(self, state: LoopState) -> None:
        """Remove what a run that ended between saving and removing has left, where this one goes on from it."""
        if self.options.save_every_n_steps:
            self.remove_old_steps(state)
        if self.every_n_epochs:
            finished = state.epoch - 1
            self.remove_old_epochs(finished - finished % self.every_n_epochs)

    def remove(
        self,
        name_of: Callable[[int], Path],
        which: Callable[[int, int, int | None], int | None],
        now: int,
        every: int,
        unit: str,
    ) -> None:
        """Remove the checkpoint and the state that have become too old."""
        if not self.accelerator.is_main_process:
            return
        keep = getattr(self.options, f"save_last_n_{unit}")
        keep_state = getattr(self.options, f"save_last_n_{unit}_state") or keep
        gone, gone_state = which(now, every, keep), which(now, every, keep_state)
        if gone is not None:
            self.remove_file(name_of(gone), saving.remove_checkpoint)
        if gone_state is not None:
            self.remove_file(self.names.state_of(name_of(gone_state)), saving.remove_state)

    def remove_file(self, path: Path, remove: Callable[[Path], None]) -> None:
        if self.uploads:
            self.uploads.wait_for(path)
        try:
            remove(path)
        except OSError as error:
            logger.warning("%s cannot be removed, and stays: %s", path, error.strerror)

    def saved(self, path: Path, state: LoopState, epoch: int) -> bool:
        """Save in the middle of training, which goes on where that is impossible; whether all was written."""
        if not is_whole(self.network):
            logger.warning("%s is not saved, and older files stay: its weights would be no numbers", path.name)
            return False
        try:
            self.save(path, state, epoch)
        except CannotWrite as error:
            logger.warning("%s; training goes on, and older files stay", error)
            return False
        return True

    def save(self, path: Path, state: LoopState, epoch: int, with_state: bool | None = None) -> None:
        """Write the network, and the state where it is wanted; `epoch` as the metadata counts it.

        CannotWrite, in the main process, after both were tried.
        """
        self.resting_mode()
        problems = []
        if self.accelerator.is_main_process:
            try:
                self.write_network(path, state, epoch)
                self.upload(path)
            except CannotWrite as error:
                problems.append(error)
        if self.options.save_state if with_state is None else with_state:
            self.training_mode()  # what a resumed run goes on with
            facts = made_with(self.options, self.plan)
            try:
                saving.save_state(self.accelerator, self.names.state_of(path), state, facts)
                if self.options.save_state_to_huggingface and self.accelerator.is_main_process:
                    self.upload(self.names.state_of(path))
            except CannotWrite as error:
                problems.append(error)
        for problem in problems[1:]:
            logger.warning(problem)
        if problems:
            raise problems[0]

    def write_network(self, path: Path, state: LoopState, epoch: int) -> None:
        self.network.save_weights(path, save_dtype(self.options.save_precision), self.metadata.at(state.step, epoch))
        logger.info("saved: %s", path)

    def upload(self, path: Path) -> None:
        if self.uploads:
            self.uploads.add(path)

    def sample_at_first(self, state: LoopState) -> None:
        if self.options.sample_at_first and self.prompts and state.step == 0:
            self.sample("e000000", state.step)

    def sample(self, when: str, step: int) -> None:
        """Draw the sample prompts on the main process, into the folder and for the trackers."""
        if not self.prompts or not self.accelerator.is_main_process:
            return
        self.resting_mode()
        folder = self.names.folder / "sample"
        name, sampler = self.options.output_name, self.options.sample_sampler
        with previews_may_fail(f"step {step}", self.options):
            paths = save_samples(self.family, self.prompts, sampler, folder, name, when)
            for tracker in self.accelerator.trackers:
                tracker.log_samples(self.prompts, paths, step)
        self.release_vae()

    def release_vae(self) -> None:
        if caches_latents(self.options):
            self.family.vae.release()

    def finish(self, state: LoopState) -> Path:
        """The last file, its state, the before-and-after picture, and where to put it all."""
        path = self.names.final()
        options = self.options
        with_state = options.save_state or options.save_state_on_train_end
        try:
            self.save(path, state, self.plan.num_epochs, with_state)
        except CannotWrite as error:
            raise self.rescued(error, state) from None
        if self.accelerator.is_main_process:
            self.check_file(path)
            if options.before_after:
                self.write_before_after()
        if self.uploads:
            self.uploads.finish()
        return path

    def stop(self, state: LoopState, cause: str) -> NoReturn:
        """Save network and state as at any other step, and end the run."""
        path = self.names.step(state.step)
        if not due(self.options.save_every_n_steps, state.step):
            state.stops.append(state.step)
        self.save(path, state, epoch=state.epoch - 1, with_state=True)
        if self.uploads:
            self.uploads.finish()
        self.accelerator.wait_for_everyone()  # launchers end all processes when the first has ended
        self.accelerator.end_training()
        raise Stopped(
            f"stopped at step {state.step} of {self.plan.max_train_steps} by {cause}; saved: {path} and "
            f"{self.names.state_of(path)}; to go on, give the same command with --resume auto"
        )

    def rescued(self, error: CannotWrite, state: LoopState) -> CannotWrite:
        """The network of a run that is done goes elsewhere where it has no room; the error with this place."""
        final = self.names.final()
        if error.filename != str(final) or error.kept:
            return error
        try:
            path = Path(tempfile.mkdtemp(prefix="athanor-")) / final.name
            self.write_network(path, state, self.plan.num_epochs)
        except OSError as other:
            return CannotWrite(final, f"{error.strerror}; {other}")
        return CannotWrite(final, f"{error.strerror}; the trained network is in {path}", path)

    def write_before_after(self) -> None:
        self.resting_mode()
        path = self.names.folder / "before_after.png"
        with previews_may_fail("the end", self.options):
            sheet = before_after_sheet(self.family, self.network, self.prompts, self.options.sample_sampler)
            write_picture(path, sheet)
            logger.info("the sample prompts without and with the network: %s", path)

    def check_file(self, path: Path) -> None:
        """Read the file back: every key must belong to a layer of the model, and the weights must be finite."""
        num_layers = self.network.check_saved(path)
        logger.info("%s was read back: all %d layers match the model", path, num_layers)
        logger.info(
            "To use it, put it into models/Lora of the Stable Diffusion WebUI or models/loras of ComfyUI; "
            "in the WebUI the prompt then has <lora:%s:1>",
            path.stem,
        )


def due(every: int | None, count: int) -> bool:
    return bool(every) and count % every == 0
