"""What a state folder holds beside what accelerate knows: averages of weights, what a kind of network keeps."""

import logging
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator
from accelerate.utils.other import load

from library.errors import UserError, first_line
from library.training.resuming import MORE_FILE

logger = logging.getLogger(__name__)


class Kept(Protocol):
    """One thing of a state."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> object: ...


class MoreState:
    """Things that go into states, by the names under which they stand there."""

    def __init__(self, accelerator: Accelerator, things: dict[str, Kept]):
        self.things = things
        if things:
            accelerator.register_for_checkpointing(self)

    def state_dict(self) -> dict[str, Any]:
        return {name: thing.state_dict() for name, thing in self.things.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, thing in self.things.items():
            if name in state:
                thing.load_state_dict(state[name])

    def restore(self, folder: Path) -> None:
        """Go on from a state; what it lacks begins now, and what only it has is told."""
        path = folder / MORE_FILE
        try:
            state = load(path, map_location="cpu") if path.is_file() else {}
            self.load_state_dict(state)
        except Exception as error:  # whatever a damaged or strange file raises
            raise UserError(f"--resume: {path} does not fit this run: {first_line(error)}") from error
        for name in self.things.keys() - state.keys():
            logger.warning("--resume: %s lacks %s, which begins anew", folder, name)
        for name in state.keys() - self.things.keys():
            logger.warning("--resume: %s has %s, which this run leaves out", folder, name)
