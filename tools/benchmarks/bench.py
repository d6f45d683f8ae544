"""What all measures have in common: runs of contestants, and the table of a measure's figures. No torch."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.benchmarks.contestants import Contestant, Job
from tools.benchmarks.harness import Facts, Figures, launch
from tools.benchmarks.inputs import FEW, REPEATS, Inputs

IN_CPU = ", CPU"  # ends the name of a figure in seconds of CPU, beside that of the clock
FOUND = "found"  # a figure that is no measure, but a number for what was found, which must be the same for all


@dataclass(frozen=True)
class Bench:
    """What all runs have in common."""

    inputs: Inputs
    runs_dir: Path
    steps: int  # that are counted
    warmup: int  # before them
    num_cached: int  # pictures whose latents are cached with a null VAE
    scan_sizes: tuple[int, ...]
    timeout: float  # seconds of one run

    def run(self, contestant: Contestant, pictures: Path, steps: int, fresh: bool = True, **more: Any) -> Facts:
        """Train on a copy of the pictures, which has no caches where it is `fresh`, into an empty output folder.

        What `Job` does not know of the rest is a setting of hook.py.
        """
        folder = self.folder_of(contestant)
        own_pictures, output = folder / "pictures", folder / "output"
        shutil.rmtree(output, ignore_errors=True)
        if fresh:
            shutil.rmtree(own_pictures, ignore_errors=True)
            shutil.copytree(pictures, own_pictures)
        of_job = {name: more.pop(name) for name in ("save_every", "cache_to_disk") if name in more}
        job = Job(own_pictures, output, steps, **of_job)
        return launch(contestant, contestant.arguments(self.inputs, job), folder, self.timeout, **more)

    def folder_of(self, contestant: Contestant) -> Path:
        return self.runs_dir / contestant.name.replace(" ", "_")

    def few_pictures(self) -> Path:
        return self.inputs.pictures(FEW, REPEATS)


@dataclass(frozen=True)
class Column:
    """One figure in the table of a measure."""

    key: str
    title: str
    digits: int = 3


@dataclass(frozen=True)
class Measure:
    """A measure, and the table of its figures; one without columns has a line for each figure."""

    title: str
    run: Callable[[Bench, Contestant], Figures]
    columns: tuple[Column, ...]
    judged: dict[str, tuple[str, ...]]  # clock -> the figures that are compared; all of a measure without columns
    is_for: Callable[[Contestant], bool] = lambda contestant: True
    parts: tuple[Contestant, ...] = ()  # what is measured instead of training, which then need not agree in losses
    noise_of: dict[str, str] = field(default_factory=dict)  # a figure that is a difference -> that of its noise
    note: str = ""  # what a reader of the table must know
    in_rounds: bool = True

    def asked(self, contestants: list[Contestant]) -> list[Contestant]:
        """Who is measured. A part is the same in every mode, so that one mode stands for all."""
        found = [who for who in contestants if self.is_for(who)]
        return [*self.parts, *found[:1]] if self.parts else found
