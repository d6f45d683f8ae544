"""The losses of a run as they are shown and logged. Needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class LossRecorder:
    """The last loss and the mean over one epoch's batches, of losses that are numbers; they are read once a step."""

    losses: list[float] = field(default_factory=list)
    window: int = 1  # batches of an epoch
    last_are_finite: bool = field(default=True, compare=False)  # all of those that were read last
    _pending: list[Tensor] = field(default_factory=list, compare=False, repr=False)

    def add(self, loss: Tensor) -> None:
        self._pending.append(loss.detach())

    def settle(self) -> None:
        """Read the losses that are still on their way."""
        if self._pending:
            read = [loss.item() for loss in self._pending]
            finite = [loss for loss in read if math.isfinite(loss)]
            self.last_are_finite = len(finite) == len(read)
            self.losses += finite
            self._pending = []
            del self.losses[: -self.window]

    @property
    def current(self) -> float | None:
        return self.losses[-1] if self.losses else None

    @property
    def average(self) -> float | None:
        return sum(self.losses) / len(self.losses) if self.losses else None
