"""Starts contestants one after the other, each in its own process, and watches whether the machine stays the same."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tools.benchmarks.contestants import Contestant
from tools.benchmarks.inputs import HERE

MAX_DRIFT = 0.10  # of the control product within a round, and between rounds
Figures = dict[str, float]


class RunFailed(Exception):
    """A contestant's process did not end well; the message is its last line."""


@dataclass(frozen=True)
class Facts:
    """What hook.py wrote of a process; times are seconds since its start."""

    wall_s: float
    cpu_s: float
    peak_rss: int  # bytes
    peak_gpu: int
    steps: list[tuple[float, float, float]]  # (wall, CPU, CPU of the loop's thread alone) at the end of each
    gpu_steps: list[float]  # ends of steps on the GPU, from the first
    losses: list[float]
    waits: list[float]
    encodes: list[dict]
    profiled: dict[str, int]
    dataset: list[float]  # seconds and seconds of CPU of its construction, where that alone was asked for

    @property
    def walls(self) -> list[float]:
        """The end of each step: on the GPU where there is one, since the host runs ahead of it."""
        return self.gpu_steps or [wall for wall, _, _ in self.steps]

    @property
    def cpus(self) -> list[float]:
        """Seconds of CPU at the end of each step."""
        return [cpu for _, cpu, _ in self.steps]

    @property
    def loop_cpus(self) -> list[float]:
        """Seconds of CPU of the loop's thread alone."""
        return [cpu for _, _, cpu in self.steps]


def launch(contestant: Contestant, arguments: list[str], folder: Path, timeout: float, **settings: Any) -> Facts:
    """Run a contestant under hook.py in a folder of its own, which keeps what it printed."""
    folder.mkdir(parents=True, exist_ok=True)
    facts, settings_path = folder / "facts.json", folder / "settings.json"
    facts.unlink(missing_ok=True)
    settings_path.write_text(json.dumps({"facts": str(facts), "started": time.time()} | settings), encoding="utf-8")
    command = [contestant.python, str(HERE / "hook.py"), str(settings_path), str(contestant.script), *arguments]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}
    with (folder / "printed.log").open("w", encoding="utf-8") as log:
        try:
            done = subprocess.run(
                command, cwd=contestant.script.parent, env=environment, stdout=log, stderr=log, timeout=timeout
            )
        except subprocess.TimeoutExpired:
            raise RunFailed(f"took longer than {timeout:.0f} s") from None
    if done.returncode or not facts.exists():
        raise RunFailed(last_error(folder / "printed.log") or f"ended with exit code {done.returncode}")
    return Facts(**json.loads(facts.read_text(encoding="utf-8")))


def last_error(log: Path) -> str:
    """The last line that tells of an error, or else the last one."""
    lines = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").split("\n")
    said = [line.strip()[:300] for line in lines if line.strip()]
    return next((line for line in reversed(said) if "rror:" in line), said[-1] if said else "")


class Control:
    """A fixed matrix product, whose time tells whether the machine still is what it was."""

    SIZE, REPEATS = 1024, 9

    def __init__(self, on_gpu: bool):
        self.on_gpu = on_gpu
        rng = np.random.default_rng(0)
        self.first, self.second = (rng.random((self.SIZE, self.SIZE), dtype=np.float32) for _ in range(2))

    def read(self) -> Figures:
        """Median seconds of one product: wall, CPU, and with a GPU also there."""
        wall, cpu = [], []
        for _ in range(self.REPEATS + 1):
            start = time.perf_counter(), time.process_time()
            self.first @ self.second
            wall.append(time.perf_counter() - start[0])
            cpu.append(time.process_time() - start[1])
        reading = {"wall": statistics.median(wall[1:]), "cpu": statistics.median(cpu[1:])}
        if self.on_gpu:
            command = [sys.executable, str(HERE / "gpu_control.py")]
            printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            reading["gpu"] = float(printed.splitlines()[-1])
        return reading

    def flops_per_second(self, clock: str) -> float:
        """What the product reaches now."""
        return 2 * self.SIZE**3 / self.read()[clock]


def drift(readings: Iterable[Figures], clocks: Iterable[str]) -> float:
    """How much the slowest control product took longer than the fastest, as a fraction, by the worst of the clocks."""
    readings = list(readings)
    return max(
        max(values) / min(values) - 1
        for clock in clocks
        if (values := [reading[clock] for reading in readings if clock in reading])
    )


@dataclass
class Round:
    """Each contestant once, with the control before, between and after."""

    figures: dict[str, Figures] = field(default_factory=dict)  # by contestant
    controls: list[Figures] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    void: str = ""  # why it does not count; empty where it does


@dataclass(frozen=True)
class Schedule:
    """How often contestants are measured, and what a round is judged by."""

    count: int  # rounds that must be valid
    spare: int = 0  # rounds more than that, at most
    control: Control | None = None  # without one every round is valid: counts do not depend on the machine's mood
    clock: str = "wall"


def run_rounds(
    contestants: list[Contestant], measure: Callable[[Contestant], Figures], schedule: Schedule
) -> Iterator[Round]:
    """All contestants in turn, as often as the schedule has it. Who fails is not asked again."""
    rounds: list[Round] = []
    left = list(contestants)
    while left and sum(not done.void for done in rounds) < schedule.count:
        if len(rounds) == schedule.count + schedule.spare:
            break
        current = one_round(left, measure, schedule.control)
        if schedule.control:
            current.void = why_void(current, [done for done in rounds if not done.void], schedule.clock)
        rounds.append(current)
        left = [contestant for contestant in left if contestant.name not in current.failures]
        yield current


def one_round(
    contestants: list[Contestant], measure: Callable[[Contestant], Figures], control: Control | None
) -> Round:
    current = Round(controls=[control.read()] if control else [])
    for contestant in contestants:
        try:
            current.figures[contestant.name] = measure(contestant)
        except RunFailed as error:
            current.failures[contestant.name] = str(error)
        if control:
            current.controls.append(control.read())
    return current


def why_void(current: Round, valid: list[Round], clock: str) -> str:
    """Why a round does not count, beside those that do; empty where it does."""
    clocks = (clock, "gpu")
    within = drift(current.controls, clocks)
    if within > MAX_DRIFT:
        return f"the control product drifted by {within:.0%} within it"
    between = drift([middle(done) for done in (*valid, current)], clocks)
    if between > MAX_DRIFT:
        return f"the control product drifted by {between:.0%} between rounds"
    return ""


def middle(done: Round) -> Figures:
    """The median of each clock of a round's controls."""
    return {clock: statistics.median(reading[clock] for reading in done.controls) for clock in done.controls[0]}
