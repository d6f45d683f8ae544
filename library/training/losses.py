"""The losses of a run as they are shown and logged. Needs no torch."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

UNIT = 2.0**149  # every fp32 number is a whole multiple of 1 / UNIT, so that sums of whole numbers are exact


@dataclass
class LossRecorder:
    """The last loss and the mean over one epoch's batches, of losses that are numbers."""

    losses: list[float] = field(default_factory=list)
    window: int = 1  # batches of an epoch
    _total: int = field(default=0, compare=False, repr=False)  # of `losses`, in units

    def __post_init__(self):
        self._total = sum(map(in_units, self.losses))

    def add(self, losses: Iterable[float]) -> None:
        """The losses of further batches."""
        finite = [loss for loss in losses if math.isfinite(loss)]
        self.losses += finite
        gone = self.losses[: -self.window]
        del self.losses[: -self.window]
        self._total += sum(map(in_units, finite)) - sum(map(in_units, gone))

    @property
    def current(self) -> float | None:
        return self.losses[-1] if self.losses else None

    @property
    def average(self) -> float | None:
        return self._total / len(self.losses) / UNIT if self.losses else None


def in_units(loss: float) -> int:
    return int(loss * UNIT)
