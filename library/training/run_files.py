"""The files of a run that trains a network: checkpoints, states, their uploads, and which of them stay."""

import logging
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path

from accelerate import Accelerator
from torch import nn

from library.adapters import verdict_report
from library.errors import CannotWrite, first_line
from library.options.groups import TrainNetworkOptions
from library.training import saving
from library.training.hub import Uploads
from library.training.meanwhile import Copies, Meanwhile, Writing, write_copies, write_in_order
from library.training.metadata import TrainingMetadata
from library.training.plan import StepPlan, save_every_n_epochs
from library.training.precision import save_dtype
from library.training.resuming import made_with
from library.training.saving import LoopState, OutputNames
from library.training.state_files import copy_state

logger = logging.getLogger(__name__)

NOT_WHOLE = "%s is not saved, and older files stay: its weights would be no numbers"


class RunFiles:
    """Writes, uploads and removes the files of a run; the caller puts the network into the mode that is saved."""

    def __init__(
        self,
        network: nn.Module,
        metadata: TrainingMetadata,
        accelerator: Accelerator,
        options: TrainNetworkOptions,
        plan: StepPlan,
    ):
        self.network, self.metadata, self.accelerator = network, metadata, accelerator
        self.options, self.plan = options, plan
        self.names = OutputNames(options)
        self.uploads = Uploads(options) if options.huggingface_repo_id else None
        self.every_n_epochs = save_every_n_epochs(options, plan.num_epochs)
        self.missed: dict[str, list[int]] = {"steps": [], "epochs": []}  # those that could not be saved, and so removed
        self.saved_step: int | None = None  # the last one whose network is in a file of this run
        self.meanwhile, self.copies, self.state_copies = Meanwhile(), Copies(), Copies()

    def write_network(self, path: Path, state: LoopState, epoch: int) -> None:
        """Write the network from the main process, and upload it; `epoch` as the metadata counts it."""
        if self.accelerator.is_main_process:
            self._write(path, state, epoch)
            self._upload(path)

    def write_state(self, checkpoint: Path, state: LoopState) -> None:
        """Write the state that belongs to a checkpoint, and upload it where that is wanted; all processes call this."""
        state.settle()
        if self.accelerator.is_main_process:
            writing = self.state_copied(checkpoint, state)
            writing.write()
            writing.written()

    def network_copied(self, path: Path, state: LoopState, epoch: int) -> Writing:
        """As `write_network`, but of a copy, which is not written where its weights are no numbers."""
        self.meanwhile.finish()  # whose copies would change
        weights = self.copies.take(self.network.live_file_weights(), save_dtype(self.options.save_precision))
        write = partial(write_copies, path, self.copies, weights, partial(self.metadata.at, state.step, epoch))
        return Writing(path, write, partial(self._network_is_written, path, state.step))

    def state_copied(self, checkpoint: Path, state: LoopState) -> Writing:
        """As `write_state`, but of a copy, made when nothing is written meanwhile."""
        folder = self.names.state_of(checkpoint)
        copied = copy_state(self.accelerator, state, made_with(self.options, self.plan), self.state_copies)
        return Writing(folder, partial(copied.write, folder), partial(self._state_is_written, folder))

    def write_meanwhile(self, writings: Sequence[Writing], then: Callable[[bool], None]) -> None:
        """Write while training goes on; `then` is told whether all went well when `meanwhile` is asked."""
        self.meanwhile.begin(partial(write_in_order, writings), partial(self._written_meanwhile, writings, then))

    def _written_meanwhile(
        self, writings: Sequence[Writing], then: Callable[[bool], None], outcomes: Future[list[bool | None | Exception]]
    ) -> None:
        problems = []
        for writing, outcome in zip(writings, outcomes.result(), strict=False):  # nothing follows what has no worth
            if outcome is False:
                logger.warning(NOT_WHOLE, writing.path.name)
            elif isinstance(outcome, Exception):
                is_told = isinstance(outcome, CannotWrite)
                problems.append(outcome if is_told else f"{writing.path} cannot be written: {first_line(outcome)}")
            else:
                writing.written()
        for problem in problems[1:]:
            logger.warning(problem)
        if problems:
            logger.warning("%s; training goes on, and older files stay", problems[0])
        then(not problems and False not in outcomes.result())

    def _write(self, path: Path, state: LoopState, epoch: int) -> None:
        self.network.save_weights(path, save_dtype(self.options.save_precision), self.metadata.at(state.step, epoch))
        self._is_written(path, state.step)

    def _is_written(self, path: Path, step: int) -> None:
        self.saved_step = step
        logger.info("saved: %s", path)

    def _network_is_written(self, path: Path, step: int) -> None:
        self._is_written(path, step)
        self._upload(path)

    def _state_is_written(self, folder: Path) -> None:
        logger.info("state saved: %s", folder)
        if self.options.save_state_to_huggingface:
            self._upload(folder)

    def _upload(self, path: Path) -> None:
        if self.uploads:
            self.uploads.add(path)

    def finish_uploads(self) -> None:
        """Wait for the uploads that are on their way."""
        if self.uploads:
            self.uploads.finish()

    def rescued(self, error: CannotWrite, state: LoopState) -> CannotWrite:
        """The network of a run that is done goes elsewhere where it has no room; the error with this place."""
        final = self.names.final()
        if error.filename != str(final) or error.kept:
            return error
        try:
            path = Path(tempfile.mkdtemp(prefix="athanor-")) / final.name
            self._write(path, state, self.plan.num_epochs)
        except OSError as other:
            return CannotWrite(final, f"{error.strerror}; {other}")
        return CannotWrite(final, f"{error.strerror}; the trained network is in {path}", path)

    def remove_old_steps(self, step: int, stops: Sequence[int]) -> None:
        """Remove what --save_last_n_steps keeps no longer at the last step that was saved, up to `step`."""
        every = self.options.save_every_n_steps
        last = step - step % every
        self.remove(self.names.step, saving.step_to_remove, last, every, "steps")
        for stop in stops:
            self.remove(self.names.step, partial(saving.stop_to_remove, stop), last, every, "steps")
        self.missed["steps"].clear()

    def remove_old_epochs(self, epoch: int) -> None:
        self.remove(self.names.epoch, saving.epoch_to_remove, epoch, self.every_n_epochs, "epochs")
        self.missed["epochs"].clear()

    def remove_outdated(self, state: LoopState) -> None:
        """Remove what a run that ended between saving and removing has left, where this one goes on from it."""
        if self.options.save_every_n_steps:
            self.remove_old_steps(state.step, state.stops)
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
        """Remove the checkpoint and the state that have become too old, now and where nothing could be saved before."""
        if not self.accelerator.is_main_process:
            return
        keep = getattr(self.options, f"save_last_n_{unit}")
        keep_state = getattr(self.options, f"save_last_n_{unit}_state") or keep
        for then in (*self.missed[unit], now):
            gone, gone_state = which(then, every, keep), which(then, every, keep_state)
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

    def check(self, path: Path) -> None:
        """Read the file back: weights must be finite and the model's; and tell what other programs make of it."""
        num_layers = self.network.check_saved(path)
        logger.info("%s was read back: all %d layers match the model", path, num_layers)
        if path.suffix == ".safetensors":
            verdict_report.tell(path)
        logger.info(
            "To use it, put it into models/Lora of the Stable Diffusion WebUI or models/loras of ComfyUI; "
            "in the WebUI the prompt then has <lora:%s:1>",
            path.stem,
        )


def due(every: int | None, count: int) -> bool:
    return bool(every) and count % every == 0
