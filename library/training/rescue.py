"""What is kept when training ends badly, and what may fail without ending it."""

import logging
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

from library.errors import Stopped, UserError, first_line
from library.options.groups import TrainNetworkOptions
from library.training.memory_errors import is_out_of_memory, sentence
from library.training.saving import LoopState

logger = logging.getLogger(__name__)

# how gloo and NCCL tell that a process they waited for is gone
LOST_PROCESS = re.compile(r"gloo.*(Connection (closed|reset) by peer|Broken pipe)|ncclRemoteError", re.DOTALL)


class Kept(Protocol):
    """What has something to keep."""

    def keep(self, state: LoopState) -> None: ...


@contextmanager
def kept_when_it_fails(recipe: Kept, state: LoopState) -> Iterator[None]:
    """Save what was learned up to the last whole step where the training inside ends in an error."""
    try:
        yield
    except Stopped:  # has saved by itself
        raise
    except Exception as error:
        forget_frames(error)
        release_memory()
        with goes_on("the network was not saved either"):
            recipe.keep(state)
        if LOST_PROCESS.search(str(error)):
            raise UserError(
                "another process of this run has ended; its own message, if it gave one, says why"
            ) from error
        raise


@contextmanager
def goes_on(what_failed: str) -> Iterator[None]:
    """A failure inside is a warning."""
    try:
        yield
    except Exception as error:  # whatever it is: nothing in here is worth a run
        logger.warning("%s: %s", what_failed, first_line(error))


@contextmanager
def previews_may_fail(when: str, options: TrainNetworkOptions) -> Iterator[None]:
    """A preview that cannot be drawn is a warning, and training goes on."""
    try:
        yield
    except Exception as error:  # whatever it is: a picture is not worth a run
        is_memory = is_out_of_memory(error)
        reason = sentence(error, "drawing previews", options) if is_memory else first_line(error)
        logger.warning("no previews at %s, and training goes on: %s", when, reason)
    release_memory()


def forget_frames(error: BaseException | None) -> None:
    """Empty the frames of an error and of its causes, which hold the memory of the step that failed."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def release_memory() -> None:
    """Give back what PyTorch holds of the GPU's memory without using it."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
