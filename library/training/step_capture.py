"""Forward and backward pass as one launch: recorded once for each shape of batch, replayed on inputs copied in place.

A GPU then runs thousands of kernels without the host (CUDA graphs). What is recorded must be the same every time: the
inputs lie where they lay, no random numbers are drawn and nothing is asked of the host in between. A step is a
training step whether it is recorded or not, so the first of each shape are run as they are, which also lets libraries
choose their kernels.
"""

import logging
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Protocol

import torch
from torch import Tensor

from library.errors import first_line
from library.families.base import ModelFamily
from library.layers.flat import FlatWeights
from library.options.derived import has_dropout
from library.options.groups import TrainNetworkOptions
from library.training.denoising import Question

logger = logging.getLogger(__name__)

USUAL_STEPS = 3  # of each shape, before one is recorded

Work = Callable[[], Tensor]


class Recorder(Protocol):
    """Makes work that can be repeated; what it reads and returns stays in its place."""

    def __call__(self, work: Work) -> Work: ...


class CudaRecorder:
    """CUDA graphs, which share their memory, as one runs at a time."""

    def __init__(self):
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Work) -> Work:
        graph, usual = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):  # others copy and save
                result = work()
        finally:
            torch.cuda.set_stream(usual)

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


class CapturedSteps:
    """Runs `step` on questions, from a recording where there is one of their shapes."""

    def __init__(self, step: Callable[[Question], Tensor], recorder: Recorder | None = None):
        self.step = step
        self.recorder = recorder or CudaRecorder()
        self.seen: dict[tuple, int] = {}
        self.recorded: dict[tuple, tuple[Question, Work]] = {}

    def __call__(self, question: Question) -> Tensor:
        if self.recorder is None:
            return self.step(question)
        shapes = shapes_of(question)
        if shapes not in self.recorded:
            self.seen[shapes] = self.seen.get(shapes, 0) + 1
            if self.seen[shapes] <= USUAL_STEPS or not self._record(shapes, question):
                return self.step(question)
        inputs, replay = self.recorded[shapes]
        copy_into(inputs, question)
        return replay().clone()  # the next replay writes into the same place

    def _record(self, shapes: tuple, question: Question) -> bool:
        """Record the step for questions of these shapes; where that fails, no more are recorded."""
        inputs = map_tensors(question, Tensor.clone)
        try:
            self.recorded[shapes] = inputs, self.recorder(lambda: self.step(inputs))
        except RuntimeError as error:
            logger.warning("--cuda_graphs is not used, steps are run as usual: %s", first_line(error))
            self.recorder = None
            self.recorded.clear()
            return False
        return True


def tensors_of(question: Question) -> dict[str, Tensor]:
    """By name, those of the conditioning too."""
    values = {field.name: getattr(question, field.name) for field in fields(question)}
    named = {f"conds.{name}": value for name, value in values.pop("conds").items()} | values
    return {name: value for name, value in named.items() if value is not None}


def shapes_of(question: Question) -> tuple:
    return tuple((name, value.shape, value.dtype) for name, value in tensors_of(question).items())


def map_tensors(question: Question, change: Callable[[Tensor], Tensor]) -> Question:
    changed = {name: change(value) for name, value in tensors_of(question).items()}
    conds = {name: changed.pop(f"conds.{name}") for name in question.conds}
    return replace(question, conds=conds, **changed)


def copy_into(inputs: Question, question: Question) -> None:
    places = tensors_of(inputs)
    for name, value in tensors_of(question).items():
        places[name].copy_(value, non_blocking=True)


def why_not_captured(
    options: TrainNetworkOptions, family: ModelFamily, flat: FlatWeights | None, device: torch.device
) -> str | None:
    """What stands against --cuda_graphs in this run, which is said; None where nothing does."""
    reasons = {
        "there is no NVIDIA GPU": device.type != "cuda",
        "the text encoder is trained, whose captions come from the host": family.trains_text_encoder,
        "this kind of network does not keep its gradients in one place": flat is None,
        "dropouts or perturbations draw random numbers in the middle of a step": has_dropout(options),
        "--cpu_offload_checkpointing moves values to the computer's memory": options.cpu_offload_checkpointing,
        "--blocks_to_swap moves weights in the middle of a step": bool(options.blocks_to_swap),
        "--torch_compile records by itself": options.torch_compile,
    }
    found = next((reason for reason, is_so in reasons.items() if is_so), None)
    if found:
        logger.warning("--cuda_graphs is not used, because %s", found)
    return found
