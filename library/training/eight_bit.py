"""Optimizers of bitsandbytes without what they wait for, and over `FlatWeights`.

They launch their kernels for one parameter after the other, and wait for the device after each: some four hundred times
a step for a LoRA on SD 1.5. Their kernels run on the stream that training runs on, in the order of their launch, so
only paged optimizers need to wait.
"""

import importlib
import sys
from copy import copy
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from library.layers.flat import FlatWeights, Span
from library.training.flat_optimizer import FlatOptimizer

MODULE = "bitsandbytes.optim.optimizer"
FLAT = "AdamW8bit", "Adam8bit", "Lion8bit"  # each number is treated for itself, but for what its block shares
BLOCK = 256  # numbers of a state in 8 bits that are rounded in units of the largest of them


def queue_steps(optimizer: Optimizer) -> None:
    """Leave out the waits in what this optimizer does, if it is one of bitsandbytes and not paged."""
    module = sys.modules.get(MODULE)
    if module is None or not hasattr(module, "sync_gpu") or not isinstance(optimizer, module.Optimizer8bit):
        return
    own = importlib.import_module("bitsandbytes.utils").sync_gpu
    module.sync_gpu = own if optimizer.is_paged else without_waiting


def without_waiting(parameter: Tensor) -> None:
    """Stands in for bitsandbytes' own function."""


def can_be_flat_in_8_bits(optimizer: Optimizer) -> bool:
    """Whether it is one of bitsandbytes that gives the same result over long vectors."""
    kind, args = type(optimizer), getattr(optimizer, "args", None)
    is_known = kind.__module__.startswith("bitsandbytes.optim.") and kind.__name__ in FLAT and not optimizer.is_paged
    return is_known and args.optim_bits == 8 and not args.max_unorm and not args.skip_zeros


class FlatEightBit(FlatOptimizer):
    """Trains the parameters of an optimizer of bitsandbytes, to the bit as it would.

    Vectors are of parameters whose states are in 8 bits, each from the beginning of a block, or of those that are so
    small that theirs are in fp32.
    """

    decides_alone = False

    def __init__(self, optimizer: Optimizer, weights: FlatWeights):
        super().__init__(optimizer, weights)
        self.single = optimizer  # knows how states are written and read
        self.state = optimizer.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.single.load_state_dict(state_dict)
        self.state, self.param_groups = self.single.state, self.single.param_groups
        self.inner = None  # made anew from what was loaded

    def _own_state_dict(self) -> dict[str, Any]:
        return self.single.state_dict()

    def _form(self, span: Span) -> bool:
        """Whether a parameter's state is in 8 bits."""
        if state := self.state.get(span.parameter):
            return state["state1"].dtype == torch.uint8
        return span.parameter.numel() >= self.single.args.min_8bit_size

    def _can_follow(self, run: list[Span], span: Span) -> bool:
        return not self._form(span) or (span.start - run[0].start) % BLOCK == 0

    def _fresh_state(self, vector: Tensor, spans: list[Span]) -> dict[str, Any]:
        """As bitsandbytes makes it; what lies between two parameters stands for 0."""
        self.inner.args = copy(self.single.args)
        self.inner.args.min_8bit_size = 0 if self._form(spans[0]) else len(vector) + 1
        groups = self.inner.param_groups
        number, place = next(
            (number, place)
            for number, group in enumerate(groups)
            for place, other in enumerate(group["params"])
            if other is vector
        )
        self.inner.init_state(groups[number], vector, number, place)
        return self.inner.state[vector]

    def _joined(self, vector: Tensor, spans: list[Span]) -> dict[str, Any]:
        joined = self._fresh_state(vector, spans)
        for name, value in joined.items():
            if name.startswith("qmap"):
                continue
            if not isinstance(value, Tensor):
                joined[name] = self.state[spans[0].parameter][name]
                continue
            if value.dtype == torch.uint8:
                value.fill_(joined[name.replace("state", "qmap")].abs().argmin().item())
            for span in spans:
                part = self._part(name, value, span, span.start - spans[0].start)
                part.copy_(self.state[span.parameter][name].view_as(part))
        return joined

    def _part(self, name: str, value: Any, span: Span, start: int) -> Any:
        if name.startswith("absmax"):
            return value[start // BLOCK : -(-(start + span.parameter.numel()) // BLOCK)]
        return value if name.startswith("qmap") else super()._part(name, value, span, start)
