"""What is measured of a contestant: each measure starts it as often as it needs, and returns its figures. No torch."""

import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from tools.benchmarks.contestants import Contestant, Job
from tools.benchmarks.harness import Facts, Figures, RunFailed, launch
from tools.benchmarks.inputs import FEW, HERE, REPEATS, Inputs

GIB = 2**30
SAVE_EVERY, NUM_SAVES = 3, 5
PHOTO_SCALE = 1.5  # of pictures whose latents are cached, against the resolution of training
IN_CPU = ", CPU"  # ends the name of a figure in seconds of CPU, beside that of the clock
SCAN_LINE = re.compile(r"(.+?) +([\d.]+) s, +([\d.]+) s of CPU")


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
    """A measure, and the table of its figures."""

    title: str
    run: Callable[[Bench, Contestant], Figures]
    columns: tuple[Column, ...]
    judged: dict[str, tuple[str, ...]]  # clock -> the figures that are compared
    is_for: Callable[[Contestant], bool] = lambda contestant: True
    is_of_dataset: bool = False  # the same in every mode, so that one of ours stands for all
    in_rounds: bool = True


def step(bench: Bench, contestant: Contestant) -> Figures:
    facts = bench.run(contestant, bench.few_pictures(), bench.warmup + bench.steps)
    seconds = intervals(facts.walls, bench)
    return {
        "step_s": statistics.median(seconds),
        "step_p95_s": percentile(seconds, 95),
        "step_cpu_s": statistics.median(intervals(facts.cpus, bench)),
        "wait_ms": 1000 * statistics.median(facts.waits[bench.warmup :]) if facts.waits else 0.0,
        "rss_gib": facts.peak_rss / GIB,
        "gpu_gib": facts.peak_gpu / GIB,
    }


def intervals(ends: list[float], bench: Bench) -> list[float]:
    """Seconds of the steps that count, of the ends of all."""
    if len(ends) < bench.warmup + bench.steps:
        raise RunFailed(f"{len(ends)} optimizer steps were seen, not {bench.warmup + bench.steps}")
    return [end - start for start, end in pairwise(ends[bench.warmup - 1 :])]


def percentile(values: list[float], percent: float) -> float:
    """By linear interpolation between the nearest."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def start(bench: Bench, contestant: Contestant) -> Figures:
    """--help, and the way to the end of the first step: without the program's own caches, and with them."""
    helped = launch(contestant, ["--help"], bench.folder_of(contestant), bench.timeout)
    figures = {"help_s": helped.wall_s, "help_cpu_s": helped.cpu_s, "help_mib": helped.peak_rss / 2**20}
    for state in ("cold", "warm"):
        to_disk = contestant.caches_latents
        facts = bench.run(contestant, bench.few_pictures(), 1, fresh=state == "cold", cache_to_disk=to_disk)
        if not facts.steps:
            raise RunFailed("no optimizer step was seen")
        figures[f"{state}_s"], figures[f"{state}_cpu_s"] = facts.steps[0]
    return figures


def scan(bench: Bench, contestant: Contestant) -> Figures:
    """tools/benchmark_scan.py on folders of several sizes: names, sizes, captions; decoding; the audit."""
    figures = {}
    for size in bench.scan_sizes:
        folder = bench.inputs.work / "scan" / str(size)
        command = [sys.executable, str(HERE.parent / "benchmark_scan.py"), str(folder), str(size)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=bench.timeout)
        if done.returncode:
            raise RunFailed(done.stderr.strip().splitlines()[-1])
        for what, wall, cpu in SCAN_LINE.findall(done.stdout):
            figures |= {f"{size}: {what.strip()}": float(wall), f"{size}: {what.strip()}{IN_CPU}": float(cpu)}
    return figures


def cache(bench: Bench, contestant: Contestant) -> Figures:
    """A picture's way into the cache on disk, with the VAE and with one that returns zeros at once: the host's cost."""
    figures = {}
    for name, count, is_null in (("vae", max(4, bench.num_cached // 8), False), ("null", bench.num_cached, True)):
        pictures = bench.inputs.pictures(count, 1, PHOTO_SCALE)
        facts = bench.run(contestant, pictures, 1, cache_to_disk=True, null_vae=is_null)
        side = bench.inputs.resolution
        calls = [call for call in facts.encodes if call["size_hw"] == [side, side]]
        num_before_last = sum(call["pictures"] for call in calls[:-1])
        if not num_before_last:
            raise RunFailed("the VAE was not seen to encode several batches of pictures")
        for clock, unit in enumerate(("ms", "cpu_ms")):
            seconds = calls[-1]["start"][clock] - calls[0]["start"][clock]
            figures[f"{name}_{unit}"] = 1000 * seconds / num_before_last
    return figures


def save(bench: Bench, contestant: Contestant) -> Figures:
    """How much longer the loop takes from one step to the next where a file is saved in between."""
    total = bench.warmup + SAVE_EVERY * NUM_SAVES + 1
    facts = bench.run(contestant, bench.few_pictures(), total, save_every=SAVE_EVERY)
    figures = {}
    for key, ends in (("stall_ms", facts.walls), ("stall_cpu_ms", facts.cpus)):
        with_save, without = [], []
        for number, (before, after) in enumerate(pairwise(ends), start=1):  # `number` steps are done before it
            if number >= bench.warmup:
                (without if number % SAVE_EVERY else with_save).append(after - before)
        if not with_save or not without:
            raise RunFailed(f"{len(ends)} optimizer steps were seen, not {total}")
        figures[key] = 1000 * (statistics.median(with_save) - statistics.median(without))
    return figures


def profile(bench: Bench, contestant: Contestant) -> Figures:
    """Kernels and waits of the host in one step, by torch's profiler; on a CPU operations stand for kernels."""
    facts = bench.run(contestant, bench.few_pictures(), bench.warmup + 3, profile_step=bench.warmup + 1)
    if not facts.profiled:
        raise RunFailed("the profiled step did not end")
    return {"kernels": float(facts.profiled["kernels"]), "waits": float(facts.profiled["waits"])}


MEASURES = {
    "step": Measure(
        "Steps",
        step,
        (
            Column("step_s", "s/step, median"),
            Column("step_p95_s", "p95"),
            Column("step_cpu_s", "CPU s/step"),
            Column("wait_ms", "wait for data, ms/step", 2),
            Column("rss_gib", "peak RSS, GiB", 2),
            Column("gpu_gib", "peak GPU, GiB", 2),
        ),
        {"wall": ("step_s", "rss_gib", "gpu_gib"), "cpu": ("step_cpu_s", "rss_gib")},
    ),
    "profile": Measure(
        "Kernels and waits of a step",
        profile,
        (Column("kernels", "kernels (CPU: operations)", 0), Column("waits", "waits of the host", 0)),
        {"wall": ("kernels",), "cpu": ("kernels",)},
        in_rounds=False,
    ),
    "start": Measure(
        "Start",
        start,
        (
            Column("help_s", "--help, s"),
            Column("help_cpu_s", "CPU s"),
            Column("help_mib", "MiB", 0),
            Column("cold_s", "first step done, cold, s", 2),
            Column("cold_cpu_s", "CPU s", 2),
            Column("warm_s", "warm, s", 2),
            Column("warm_cpu_s", "CPU s", 2),
        ),
        {"wall": ("help_s", "cold_s", "warm_s"), "cpu": ("help_cpu_s", "cold_cpu_s", "warm_cpu_s")},
    ),
    "cache": Measure(
        "Caching latents",
        cache,
        (
            Column("vae_ms", "ms/picture", 1),
            Column("vae_cpu_ms", "CPU ms", 1),
            Column("null_ms", "with a null VAE, ms/picture", 2),
            Column("null_cpu_ms", "CPU ms", 2),
        ),
        {"wall": ("vae_ms", "null_ms"), "cpu": ("vae_cpu_ms", "null_cpu_ms")},
        is_for=lambda contestant: contestant.caches_latents,
    ),
    "save": Measure(
        "Stall of the loop at a save",
        save,
        (Column("stall_ms", "ms", 1), Column("stall_cpu_ms", "CPU ms", 1)),
        {"wall": (), "cpu": ()},  # differences of steps, around 0 where nothing stalls
    ),
    "scan": Measure(
        "Scanning a dataset",
        scan,
        (),
        {"wall": (), "cpu": ()},
        is_for=lambda contestant: contestant.kind == "ours",
        is_of_dataset=True,
    ),
}
