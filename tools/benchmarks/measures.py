"""What is measured of a contestant: each measure starts it as often as it needs, and returns its figures. No torch."""

import statistics
from itertools import pairwise

from tools.benchmarks.bench import Bench, Column, Measure
from tools.benchmarks.contestants import Contestant
from tools.benchmarks.harness import Figures, RunFailed, launch
from tools.benchmarks.parts import LATENT_READS, SCANS, latent_read, scan

GIB = 2**30
SAVE_EVERY, NUM_SAVES = 3, 5
PHOTO_SCALE = 1.5  # of pictures whose latents are cached, against the resolution of training


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
        figures[f"{state}_s"], figures[f"{state}_cpu_s"], _ = facts.steps[0]
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
    """How much longer the loop takes from one step to the next where a file is saved in between.

    The noise is the deviation of the other intervals: half of what the middle 68 % of them spread over. CPU seconds are
    those of the loop's thread, which leave out that it may wait, and beside them those of all threads.
    """
    total = bench.warmup + SAVE_EVERY * NUM_SAVES + 1
    facts = bench.run(contestant, bench.few_pictures(), total, save_every=SAVE_EVERY)
    figures = {}
    for unit, ends in (("ms", facts.walls), ("cpu_ms", facts.loop_cpus), ("all_cpu_ms", facts.cpus)):
        with_save, without = [], []
        for number, (before, after) in enumerate(pairwise(ends), start=1):  # `number` steps are done before it
            if number >= bench.warmup:
                (without if number % SAVE_EVERY else with_save).append(after - before)
        if not with_save or not without:
            raise RunFailed(f"{len(ends)} optimizer steps were seen, not {total}")
        figures[f"stall_{unit}"] = 1000 * (statistics.median(with_save) - statistics.median(without))
        figures[f"noise_{unit}"] = 500 * (percentile(without, 84) - percentile(without, 16))
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
        {"wall": ("step_s", "wait_ms", "rss_gib", "gpu_gib"), "cpu": ("step_cpu_s", "rss_gib", "gpu_gib")},
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
        (
            Column("stall_ms", "ms", 1),
            Column("noise_ms", "noise, ms", 1),
            Column("stall_cpu_ms", "CPU ms of the loop", 1),
            Column("noise_cpu_ms", "noise, CPU ms", 1),
            Column("stall_all_cpu_ms", "CPU ms of all threads", 1),
        ),
        {"wall": ("stall_ms",), "cpu": ("stall_cpu_ms",)},
        noise_of={"stall_ms": "noise_ms", "stall_cpu_ms": "noise_cpu_ms"},
        note="Stalls are differences: a ratio is given where the other's is above three times its noise in every "
        "round that counts, and ours is taken as no less than its own noise, so that it may be less than that.",
    ),
    "scan": Measure(
        "Scanning a dataset",
        scan,
        (),
        {},
        is_for=lambda contestant: contestant.kind == "kohya",
        parts=SCANS,
        note="The imitation does what is known of kohya's way to scan a folder, in code of our own; it remembers "
        "nothing, so that its second scan is as the first. The rest of the lines is what ours does besides.",
    ),
    "read": Measure(
        "Reading one picture's cached latents",
        latent_read,
        (
            Column("read_ms", "ms", 4),
            Column("read_cpu_ms", "CPU ms", 4),
            Column("first_ms", "for the first time, ms", 4),
            Column("first_cpu_ms", "CPU ms", 4),
        ),
        {"wall": ("read_ms",), "cpu": ("read_cpu_ms",)},
        is_for=lambda contestant: False,
        parts=LATENT_READS,
        note="Of pictures of 512x512, from files that the system holds in memory. The imitation opens a file as "
        "kohya's scripts have them with np.load at every step.",
    ),
}
