"""The losses of a run as they are shown and logged. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class LossRecorder:
    """The last loss and the mean over one epoch's batches; losses are read one step late, so nothing waits."""

    losses: list[float] = field(default_factory=list)
    window: int = 1  # batches of an epoch
    _pending: Tensor | None = field(default=None, compare=False, repr=False)

    def add(self, loss: Tensor) -> None:
        self.settle()
        self._pending = loss.detach()

    def settle(self) -> None:
        """Read the loss that is still on its way."""
        if self._pending is not None:
            self.losses.append(self._pending.item())
            self._pending = None
            del self.losses[: -self.window]

    @property
    def current(self) -> float | None:
        return self.losses[-1] if self.losses else None

    @property
    def average(self) -> float | None:
        return sum(self.losses) / len(self.losses) if self.losses else None
