"""The record of a run beside its network: what it was told, what it ran on, how long its steps took."""

import json
import logging
import os
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from math import ceil
from typing import Any

from library.errors import Stopped, first_line
from library.files import write_text_whole
from library.options.groups import TrainNetworkOptions
from library.options.recorded import FORMAT, recorded_options
from library.secrets import redacted
from library.training.plan import StepPlan
from library.training.running import mark_of
from library.training.saving import LoopState, OutputNames

logger = logging.getLogger(__name__)

MAX_STRETCHES = 200


class StepTimes:
    """Seconds from the end of one step to the end of the next, where nothing else was done in between.

    Nothing waits for the device: its work is queued, and over many steps the queue moves at the device's pace.
    """

    def __init__(self):
        self.seconds = array("d")
        self.cpu_seconds = array("d")  # of all threads of the process
        self._last: tuple[float, float] | None = None

    def step_finished(self) -> None:
        now = time.perf_counter(), time.process_time()
        if self._last is not None:
            self.seconds.append(now[0] - self._last[0])
            self.cpu_seconds.append(now[1] - self._last[1])
        self._last = now

    def interrupted(self) -> None:
        """Something else than training begins: the step in which it falls is not counted."""
        self._last = None

    def summary(self) -> dict[str, Any]:
        """How long steps took, and means of stretches of steps in their order, which show a run that slows down."""
        if not self.seconds:
            return {"counted": 0}
        ordered, size = sorted(self.seconds), ceil(len(self.seconds) / MAX_STRETCHES)
        stretches = [self.seconds[start : start + size] for start in range(0, len(ordered), size)]
        return {
            "counted": len(ordered),
            "mean": round(sum(ordered) / len(ordered), 6),
            "p50": round(_percentile(ordered, 50), 6),
            "p95": round(_percentile(ordered, 95), 6),
            "cpu_p50": round(_percentile(sorted(self.cpu_seconds), 50), 6),
            "steps_a_stretch": size,
            "stretches": [round(sum(stretch) / len(stretch), 6) for stretch in stretches],
        }


def _percentile(ordered: list[float], percent: int) -> float:
    return ordered[ceil(len(ordered) * percent / 100) - 1]


class RunRecord:
    """`NAME-run.json`: written when training begins, at every save, which a killed run so tells, and at the end."""

    def __init__(
        self,
        options: TrainNetworkOptions,
        plan: StepPlan,
        times: StepTimes,
        facts: dict[str, Any],
        later_facts: Callable[[], dict[str, Any]] = dict,
    ):
        """`later_facts` are asked for at each writing: what is found out meanwhile."""
        self.options, self.plan, self.times, self.facts, self.later_facts = options, plan, times, facts, later_facts
        self.path = OutputNames(options).record()
        self.started = datetime.now()

    @contextmanager
    def kept(self, state: LoopState) -> Iterator[None]:
        """Write the record before and after a block of training."""
        self.write("running", state)
        try:
            yield
        except (Stopped, KeyboardInterrupt):
            self.write("stopped", state)
            raise
        except Exception as error:
            self.write("failed", state, first_line(error))
            raise
        self.write("finished", state)

    def write(self, outcome: str, state: LoopState, error: str | None = None) -> None:
        """Write all that is known by now; where that fails, a warning: the run is worth more."""
        drawn = {} if self.options.seed is not None else {"seed": state.seed}
        if drawn and self.options.validation_seed is None and "validation" in self.facts["dataset"]["num_pictures"]:
            drawn["validation_seed"] = 0  # which pictures are held out does not depend on a seed that is drawn
        content = {
            FORMAT: 1,
            "outcome": outcome,
            **({"process": mark_of(os.getpid())} if outcome == "running" else {}),
            "error": error,
            "started": self.started.isoformat(timespec="seconds"),
            "written": datetime.now().isoformat(timespec="seconds"),
            "progress": {
                "epochs": [state.epoch, self.plan.num_epochs],
                "steps": [state.step, self.plan.max_train_steps],
                "loss_average": state.losses.average,
            },
            "seconds_a_step": self.times.summary(),
            "curves": state.curves.kept(),
            **self.facts,
            **self.later_facts(),
            **recorded_options(self.options, drawn),
        }
        try:
            write_text_whole(self.path, redacted(to_text(content)))
        except OSError as problem:
            logger.warning("the record of the run cannot be written to %s: %s", self.path, problem.strerror)


def to_text(content: dict[str, Any]) -> str:
    """JSON with a line for each key, also for those of tables."""
    return _lines_of(content, depth=0) + "\n"


def _lines_of(value: Any, depth: int) -> str:
    if depth > 1 or not isinstance(value, dict) or not value:
        return json.dumps(value, ensure_ascii=False)
    indent = " " * depth
    lines = [f"{indent} {json.dumps(name)}: {_lines_of(item, depth + 1)}" for name, item in value.items()]
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
