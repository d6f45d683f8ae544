"""What the loop asks of a run that trains an adapter network: its loss, and what to write when."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NoReturn

from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from library.errors import CannotWrite, Stopped
from library.families.base import Batch, ModelFamily
from library.options.derived import caches_latents
from library.options.groups import TrainNetworkOptions
from library.pictures import write_picture
from library.training.divergence import is_whole, likely_cause
from library.training.ema import AverageWeights
from library.training.forward_backward import ForwardBackward
from library.training.gradients import Gradients, flat_of, gradients_of
from library.training.host_copy import HostCopy
from library.training.metadata import TrainingMetadata
from library.training.more_state import MoreState
from library.training.optimizers import OptimizerSpec
from library.training.plan import StepPlan
from library.training.precision import save_dtype
from library.training.prompts import SamplePrompt
from library.training.record import RunRecord, StepTimes
from library.training.rescue import previews_may_fail
from library.training.run_files import NOT_WHOLE, RunFiles, due
from library.training.sampling import before_after_sheet, save_samples
from library.training.saving import LoopState
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
        self.forward_backward = ForwardBackward(family, network, accelerator, options)
        self.files = RunFiles(network, metadata, accelerator, options, plan)
        self.names = self.files.names
        self.group_names = [group["name"] for group in groups]
        self.average = average_of(optimizer, network, options) if options.ema else None
        self.weights = TwoWeights(optimizer) if spec.schedule_free else self.average
        averages = {"an average of weights (--ema)": self.average} if options.ema else {}
        self.more_state = MoreState(accelerator, network.kept() | averages)
        self.limited_norms = None  # those of the last step, with --scale_weight_norms
        self.step_times = StepTimes()
        self.record: RunRecord | None = None  # of the main process

    def backward(self, batch: Batch, accumulation: int) -> Tensor:
        return self.forward_backward.backward(batch, accumulation)

    def validation_losses(self, batch: Batch, timesteps: list[int]) -> Tensor:
        return self.forward_backward.losses(batch, timesteps)

    def gradients(self) -> Gradients:
        return gradients_of(self.optimizer, self.network)

    def learning_rates(self) -> dict[str, float]:
        rates = {}
        for name, group in zip(self.group_names, self.optimizer.param_groups, strict=True):
            rates[name] = group["lr"]
            if "d" in group:  # D-Adaptation, Prodigy and their kin, of whatever package
                rates[f"d*lr/{name}"] = group["d"] * group["lr"]
        return rates

    def weights_updated(self, taken: Tensor | bool) -> None:
        self.network.weights_updated(taken)
        if self.options.scale_weight_norms and taken is not False:
            self.limited_norms = self.network.limit_norms(self.options.scale_weight_norms, taken)
        if self.average:
            self.average.update(taken)

    def metrics(self) -> Callable[[], dict[str, float]]:
        limited = self.limited_norms
        if not limited:
            return dict
        values = HostCopy(limited.values())
        return lambda: limited.logged(values.read())

    def cause_of_nan(self, batches: list[Batch]) -> str | None:
        return likely_cause(self.family, self.network, batches, self.options)

    def keep(self, state: LoopState) -> None:
        """Save the network as a step's, where it has learned, is whole and not saved yet, as a run ends too early."""
        self.files.meanwhile.finish()
        if state.has_learned and self.files.saved_step != state.step and self.can_be_saved():
            self.save(self.names.step(state.step), state, epoch=state.epoch - 1, with_state=False)

    def can_be_saved(self) -> bool:
        return is_whole(self.network, save_dtype(self.options.save_precision))

    def training_mode(self) -> None:
        if not self.network.training:  # it takes milliseconds, and is asked for before every batch
            self.network.train()
        if self.weights:
            self.weights.train()

    def resting_mode(self) -> None:
        """As the network is saved and sampled: no dropout, and averaged weights where there are any."""
        self.step_times.interrupted()
        self.network.eval()
        if self.weights:
            self.weights.average()

    def step_finished(self, state: LoopState) -> None:
        self.step_times.step_finished()
        self.files.meanwhile.look()
        options = self.options
        if options.sample_every_n_epochs is None and due(options.sample_every_n_steps, state.step):
            self.sample(f"{state.step:06d}", state.step)
        if due(options.save_every_n_steps, state.step):
            self.save_and_go_on(self.names.step(state.step), state, state.epoch - 1, "steps", state.step)

    def epoch_finished(self, state: LoopState) -> None:
        if due(self.options.sample_every_n_epochs, state.epoch):
            self.sample(f"e{state.epoch:06d}", state.step)
        if due(self.files.every_n_epochs, state.epoch) and state.epoch < self.plan.num_epochs:
            self.save_and_go_on(self.names.epoch(state.epoch), state, state.epoch, "epochs", state.epoch)

    def save_and_go_on(self, path: Path, state: LoopState, epoch: int, unit: str, number: int) -> None:
        """Save in the middle of training, which goes on where that is impossible.

        The file is written meanwhile, where others than the network itself can, and its state behind it: the newest
        state, from which --resume auto goes on, never is of a step whose network was not tried before.
        """
        then = partial(self.was_saved, state, unit, number)
        if self.network.file_is_known:
            self.save_meanwhile(path, state, epoch, then)
            return
        if not self.can_be_saved():
            logger.warning(NOT_WHOLE, path.name)
            then(False)
            return
        try:
            self.save(path, state, epoch)
        except CannotWrite as error:
            logger.warning("%s; training goes on, and older files stay", error)
            then(False)
        else:
            then(True)

    def save_meanwhile(self, path: Path, state: LoopState, epoch: int, then: Callable[[bool], None]) -> None:
        """Copy the network, and the state where it is wanted; both are written while training goes on.

        The main process has all there is to write, however many there are.
        """
        if not self.accelerator.is_main_process:
            if self.options.save_state:
                state.settle()  # as copying a state does
            return
        if self.weights:
            self.weights.average()
        writings = [self.files.network_copied(path, state, epoch)]
        if self.options.save_state:
            self.training_mode()  # what a resumed run goes on with
            writings.append(self.files.state_copied(path, state))
        self.files.write_meanwhile(writings, then)

    def was_saved(self, state: LoopState, unit: str, number: int, is_written: bool) -> None:
        """What follows a save of that step or epoch: older ones go, or stay until the next that goes well."""
        if not is_written:
            self.files.missed[unit].append(number)
            return
        if unit == "steps":
            self.files.remove_old_steps(number, state.stops)
        else:
            self.files.remove_old_epochs(number)
        if self.record:
            self.record.write("running", state)

    def save(self, path: Path, state: LoopState, epoch: int, with_state: bool | None = None) -> None:
        """Write the network, and the state where it is wanted; `epoch` as the metadata counts it.

        CannotWrite, in the main process, after both were tried.
        """
        problems: list[CannotWrite] = []
        self.files.meanwhile.finish()
        self.resting_mode()
        with collected(problems):
            self.files.write_network(path, state, epoch)
        if self.options.save_state if with_state is None else with_state:
            self.training_mode()  # what a resumed run goes on with
            with collected(problems):
                self.files.write_state(path, state)
        for problem in problems[1:]:
            logger.warning(problem)
        if problems:
            raise problems[0]

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
            raise self.files.rescued(error, state) from None
        if self.accelerator.is_main_process:
            self.files.check(path)
            if options.before_after:
                self.write_before_after()
        self.files.finish_uploads()
        return path

    def stop(self, state: LoopState, cause: str) -> NoReturn:
        """Save network and state as at any other step, and end the run."""
        path = self.names.step(state.step)
        if not due(self.options.save_every_n_steps, state.step):
            state.stops.append(state.step)
        self.save(path, state, epoch=state.epoch - 1, with_state=True)
        self.files.finish_uploads()
        self.accelerator.wait_for_everyone()  # launchers end all processes when the first has ended
        self.accelerator.end_training()
        raise Stopped(
            f"stopped at step {state.step} of {self.plan.max_train_steps} by {cause}; saved: {path} and "
            f"{self.names.state_of(path)}; to go on, give the same command with --resume auto"
        )

    def write_before_after(self) -> None:
        self.resting_mode()
        path = self.names.folder / "before_after.png"
        with previews_may_fail("the end", self.options):
            sheet = before_after_sheet(self.family, self.network, self.prompts, self.options.sample_sampler)
            write_picture(path, sheet)
            logger.info("the sample prompts without and with the network: %s", path)


def average_of(optimizer: Optimizer, network: nn.Module, options: TrainNetworkOptions) -> AverageWeights:
    """The average of what is trained, which begins with the weights as they are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return AverageWeights(parameters, flat_of(network), options.ema_decay)


@contextmanager
def collected(problems: list[CannotWrite]) -> Iterator[None]:
    """What cannot be written inside is added to the problems."""
    try:
        yield
    except CannotWrite as error:
        problems.append(error)
