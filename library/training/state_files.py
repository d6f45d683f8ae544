"""The state of a run, copied as it stands between two steps, and written as accelerate's `save_state` writes it."""

import io
import json
import pickle
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor

from library.files import failed_writes_told, put_folder_in_place, temporary_beside, write_text_whole
from library.training.meanwhile import Copies
from library.training.resuming import MORE_FILE, OPTIMIZER_FILE, SCALER_FILE, SCHEDULE_FILE, WEIGHTS_FILE
from library.training.saving import STATE_FILE, LoopState


@dataclass(frozen=True)
class StateCopy:
    """A state as it was when it was copied; its tensors are there until `copies` takes others."""

    pickled: bytes  # the contents of all files by their names, but for the tensors
    tensors: list[Tensor]
    copies: Copies
    facts: str  # the text of STATE_FILE

    def write(self, folder: Path) -> None:
        """The folder appears whole. CannotWrite where it cannot; an older state of this name is then there yet."""
        self.copies.wait()
        unfinished = temporary_beside(folder)
        num_bytes = sum(tensor.nbytes for tensor in self.tensors)
        try:
            with failed_writes_told(folder, num_bytes, unfinished):
                unfinished.mkdir(parents=True)
                for name, content in self._contents().items():
                    if name == WEIGHTS_FILE:
                        save_file(content, unfinished / name, {"format": "pt"})
                    else:
                        torch.save(content, unfinished / name)
                write_text_whole(unfinished / STATE_FILE, self.facts)
                share_alike(unfinished)
                put_folder_in_place(unfinished, folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)

    def _contents(self) -> dict[str, Any]:
        unpickler = pickle.Unpickler(io.BytesIO(self.pickled))
        unpickler.persistent_load = self.tensors.__getitem__
        return unpickler.load()


class WithoutTensors(pickle.Pickler):
    """Pickles anything but leaves its tensors out, which are then copied all at once."""

    def __init__(self, file: io.BytesIO):
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []
        self._numbers: dict[int, int] = {}

    def persistent_id(self, value: Any) -> int | None:
        """The number of a tensor; those of other classes or in another order know best how they are copied."""
        if type(value) is not Tensor or not value.is_contiguous():
            return None
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self.tensors)
            self.tensors.append(value)
        return self._numbers[id(value)]


def copy_state(
    accelerator: Accelerator, state: LoopState, made_with: dict[str, Any] | None = None, copies: Copies | None = None
) -> StateCopy:
    """Copy weights, optimizer, schedule, scaler and random generators, in the main process.

    It writes for all: the others have the same weights, and seed their generators at every batch. `made_with` is what a
    run that goes on from the state compares itself with; `copies` is memory that was used before.
    """
    file, copies = io.BytesIO(), copies or Copies()
    pickler = WithoutTensors(file)
    pickler.dump(contents(accelerator))
    taken = copies.take({str(number): tensor for number, tensor in enumerate(pickler.tensors)}, None)
    facts = json.dumps(state.facts() | (made_with or {}))  # may wait for the step, behind which the device copies
    return StateCopy(file.getvalue(), list(taken.values()), copies, facts)


def contents(accelerator: Accelerator) -> dict[str, Any]:
    """What stands in the files of a state, as training goes on to change it; names and contents are accelerate's."""
    (model,), (prepared,) = accelerator._models, accelerator._optimizers
    optimizer = prepared.optimizer
    parts = {
        SCHEDULE_FILE: accelerator._schedulers,
        MORE_FILE: accelerator._custom_objects,
        SCALER_FILE: [accelerator.scaler] if accelerator.scaler else [],
    }
    found = {  # the `state_dict` of ours are copies already
        WEIGHTS_FILE: getattr(model, "live_weights", model.state_dict)(),
        OPTIMIZER_FILE: getattr(optimizer, "live_state_dict", optimizer.state_dict)(),
    }
    found |= {name: part.state_dict() for name, at_most_one in parts.items() for part in at_most_one}
    return found | {f"random_states_{accelerator.process_index}.pkl": random_states(accelerator)}


def random_states(accelerator: Accelerator) -> dict[str, Any]:
    """Python's, numpy's and PyTorch's random generators."""
    found = {
        "step": accelerator.step,
        "random_state": random.getstate(),
        "numpy_random_seed": np.random.get_state(),
        "torch_manual_seed": torch.get_rng_state(),
    }
    if torch.xpu.is_available():
        found["torch_xpu_manual_seed"] = torch.xpu.get_rng_state_all()
    if torch.cuda.is_available():
        found["torch_cuda_manual_seed"] = torch.cuda.get_rng_state_all()
    return found


def share_alike(folder: Path) -> None:
    """Give all files of a state the permissions of its own: safetensors writes files that only their owner may read."""
    mode = (folder / STATE_FILE).stat().st_mode
    for path in folder.iterdir():
        if path.is_file():
            path.chmod(mode)
