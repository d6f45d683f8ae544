"""What became of steps, which the host may learn late: it queues the next step while the device computes this one."""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from library.families.base import Batch
from library.training.divergence import SkippedSteps
from library.training.host_copy import HostCopy
from library.training.saving import LoopState

LATE = {"cuda": 1}  # steps that may be under way when a step is told, by type of device; for others 0


class Told(Protocol):
    """What a recipe tells of a step."""

    def learning_rates(self) -> dict[str, float]: ...

    def metrics(self) -> Callable[[], dict[str, float]]: ...  # more values for the log; reading them may wait

    def cause_of_nan(self, batches: list[Batch]) -> str | None: ...


@dataclass(frozen=True)
class Outcome:
    """A step as it was queued."""

    step: int
    batches: list[Batch]
    losses: list[HostCopy]
    taken: HostCopy | bool
    rates: dict[str, float]  # learning rates that the host knows
    logged: Callable[[], dict[str, float]]


class Outcomes:
    """Skipped steps, the log and the bar, told in the order of the steps."""

    def __init__(self, recipe: Told, skipped: SkippedSteps, bar: tqdm, accelerator: Accelerator, state: LoopState):
        self.recipe, self.skipped, self.bar = recipe, skipped, bar
        self.accelerator, self.state = accelerator, state
        self.late = LATE.get(accelerator.device.type, 0)
        self.under_way: deque[Outcome] = deque()

    def add(self, step: int, batches: list[Batch], losses: list[HostCopy], taken: Tensor | bool) -> None:
        """A step that was queued; tells those that are done by now."""
        rates = self.recipe.learning_rates()
        metrics = self.recipe.metrics() if self.accelerator.trackers else dict
        logged = lambda: {f"lr/{name}": rate for name, rate in rates.items()} | metrics()  # noqa: E731
        on_host = {name: float(rate) for name, rate in rates.items() if isinstance(rate, float | int)}
        known = HostCopy(taken) if isinstance(taken, Tensor) else taken
        self.under_way.append(Outcome(step, batches, losses, known, on_host, logged))
        self.settle(self.late)

    def settle(self, but: int = 0) -> None:
        """Tell all steps but the last few; Diverged where too many in a row were skipped."""
        while len(self.under_way) > but:
            self._tell(self.under_way.popleft())

    def _tell(self, outcome: Outcome) -> None:
        losses = self.state.losses
        read = [loss.item() for loss in outcome.losses]
        are_finite = all(map(math.isfinite, read))
        losses.add(read)
        self.state.curves.add("loss", outcome.step, sum(read) / len(read))
        for name, rate in outcome.rates.items():
            self.state.curves.add(f"lr/{name}", outcome.step, rate)
        taken = outcome.taken if isinstance(outcome.taken, bool) else bool(outcome.taken.item())
        if taken:
            self.state.has_learned = True
            self.skipped.taken()
        else:
            cause = partial(self.recipe.cause_of_nan, outcome.batches)
            self.skipped.skipped(outcome.step, cause, are_finite)
        if self.accelerator.trackers:
            values = {"loss/current": losses.current, "loss/average": losses.average} if are_finite else {}
            self.accelerator.log(values | outcome.logged(), step=outcome.step)
        if losses.average is not None:
            self.bar.set_postfix(avr_loss=f"{losses.average:.4f}", refresh=False)
