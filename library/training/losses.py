"""The losses of a run as they are shown and logged, and curves of what changes with the steps. Needs no torch."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

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


MAX_POINTS = 500  # kept of a curve


@dataclass
class Curve:
    """Values over steps as means of stretches, which grow with the run so that few are kept."""

    steps_a_stretch: int = 1
    points: list[list[float]] = field(default_factory=list)  # [last step, mean] of each stretch
    _open: list[float] = field(default_factory=list, repr=False)  # values of the stretch that is not full yet
    _last: int = 0

    def add(self, step: int, value: float) -> None:
        if not math.isfinite(value):
            return
        self._open.append(value)
        self._last = step
        if len(self._open) < self.steps_a_stretch:
            return
        self.points.append([step, sum(self._open) / len(self._open)])
        self._open.clear()
        if len(self.points) >= 2 * MAX_POINTS:
            pairs = zip(self.points[::2], self.points[1::2], strict=True)
            self.points = [[later[0], (earlier[1] + later[1]) / 2] for earlier, later in pairs]
            self.steps_a_stretch *= 2

    def kept(self) -> dict[str, Any]:
        """What is written of it: all values, also those of a stretch that is not full."""
        rest = [[self._last, sum(self._open) / len(self._open)]] if self._open else []
        return {
            "steps_a_stretch": self.steps_a_stretch,
            "points": [[s, float(f"{v:.6g}")] for s, v in self.points + rest],
        }


class Curves(dict[str, Curve]):
    """Curves by name: "loss", "validation loss", "lr/unet" and so on."""

    def add(self, name: str, step: int, value: float) -> None:
        self.setdefault(name, Curve()).add(step, value)

    def kept(self) -> dict[str, Any]:
        return {name: curve.kept() for name, curve in self.items()}

    @classmethod
    def of(cls, kept: Any) -> "Curves":
        """Curves that were written; none where what is there is something else."""
        try:
            return cls({str(n): Curve(int(c["steps_a_stretch"]), [[int(s), float(v)] for s, v in c["points"]])
                        for n, c in dict(kept).items()})  # fmt: skip
        except (TypeError, ValueError, KeyError):
            return cls()
