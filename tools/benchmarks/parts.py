"""Measures of what surrounds the training step, beside imitations of kohya's scripts: scanning, reading latents."""

import json
import re
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

from tools.benchmarks.bench import FOUND, IN_CPU, Bench
from tools.benchmarks.contestants import Contestant, Job
from tools.benchmarks.harness import Figures, RunFailed, last_error, launch
from tools.benchmarks.inputs import HERE
from tools.benchmarks.scan_folder import RESOLUTION, SCANNED

SCAN_LINE = re.compile(r"(.+?) +([\d.]+) s, +([\d.]+) s of CPU")
FOUND_LINE = re.compile(r"^found (\d+)$", re.MULTILINE)


def part(kind: str, name: str, script: Path, *arguments: str) -> Contestant:
    """A script that does one thing in one way."""
    return Contestant(kind, name, arguments, sys.executable, script)


SCANS = (
    part("ours", "", HERE.parent / "benchmark_scan.py"),
    part("imitation", "of kohya", HERE / "kohya_like_scan.py"),
)
LATENT_READS = (
    part("ours", "packed", HERE / "latent_reads.py", "packed"),
    part("ours", ".npz", HERE / "latent_reads.py", "npz"),
    part("imitation", "of kohya", HERE / "latent_reads.py", "np.load"),
)


def scan(bench: Bench, contestant: Contestant) -> Figures:
    """Folders of several sizes: names, sizes, captions and buckets; for ours also what a start does besides."""
    return scan_of_peer(bench, contestant) if contestant.kind == "kohya" else scan_of_part(bench, contestant)


def scan_of_part(bench: Bench, contestant: Contestant) -> Figures:
    figures, found = {}, 0
    for count in bench.scan_sizes:
        printed = printed_by(contestant, bench, str(scan_folder(bench, count)), str(count))
        for what, wall, cpu in SCAN_LINE.findall(printed):
            figures |= {f"{count}: {what.strip()}": float(wall), f"{count}: {what.strip()}{IN_CPU}": float(cpu)}
        found = zlib.crc32(FOUND_LINE.search(printed)[1].encode(), found)
    return figures | {FOUND: found}


def scan_of_peer(bench: Bench, peer: Contestant) -> Figures:
    """The construction of its dataset, seen by hook.py; it remembers nothing, so that cold and warm are the same."""
    figures = {}
    inputs = replace(bench.inputs, resolution=RESOLUTION)
    for count in bench.scan_sizes:
        folder = bench.folder_of(peer)
        arguments = peer.arguments(inputs, Job(scan_folder(bench, count).parent, folder / "output", 1))
        facts = launch(peer, [*arguments, "--enable_bucket"], folder, bench.timeout, dataset_alone=True)
        if not facts.dataset:
            raise RunFailed("it was not seen to construct its dataset")
        for state in ("cold", "warm"):
            figures |= {
                f"{count}: {state}: {SCANNED}{unit}": s for unit, s in zip(("", IN_CPU), facts.dataset, strict=True)
            }
    return figures


def scan_folder(bench: Bench, count: int) -> Path:
    return bench.inputs.work / "scan" / str(count) / "1_picture"


def latent_read(bench: Bench, contestant: Contestant) -> Figures:
    """One picture's latents, again and again as in later epochs, and for the first time."""
    return json.loads(printed_by(contestant, bench, str(bench.inputs.work / "latents")))


def printed_by(contestant: Contestant, bench: Bench, folder: str, *more: str) -> str:
    """What a part prints, measured on a folder."""
    log = bench.folder_of(contestant) / "printed.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [contestant.python, str(contestant.script), folder, *contestant.flags, *more]
    with log.open("w", encoding="utf-8") as file:
        try:
            done = subprocess.run(command, stdout=file, stderr=file, timeout=bench.timeout)
        except subprocess.TimeoutExpired:
            raise RunFailed(f"took longer than {bench.timeout:.0f} s") from None
    if done.returncode:
        raise RunFailed(last_error(log))
    return log.read_text(encoding="utf-8")
