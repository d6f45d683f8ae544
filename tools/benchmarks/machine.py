"""The machine a benchmark ran on, and what its processor can do at most. No torch."""

import os
import platform
from datetime import date
from pathlib import Path

import psutil

GIB = 2**30
PEAKS = {  # part of a card's name -> dense bf16 TFLOP/s with sums in fp32, from the makers' tables
    "H200": 989.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "RTX 5090": 209.5,
    "RTX 4090": 165.2,
    "RTX 4080": 97.5,
    "RTX 3090 Ti": 80.0,
    "RTX 3090": 71.0,
    "RTX 3060": 25.5,
}


def machine(name: str, torch_facts: dict) -> dict[str, str]:
    """What a reader must know of the machine called so."""
    memory = psutil.virtual_memory().total / GIB
    return {
        "machine": name,
        "date": date.today().isoformat(),
        "processor": f"{processor()}, {os.cpu_count()} logical cores",
        "memory": f"{memory:.0f} GiB",
        "GPU": torch_facts["gpu"] or "none",
        "system": f"{platform.system()} {platform.release()}",
        "Python": platform.python_version(),
        "torch": f"{torch_facts['torch']}, {torch_facts['torch_threads']} threads",
        "load": "unknown" if not hasattr(os, "getloadavg") else f"{os.getloadavg()[0]:.1f} at the start",
    }


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def peak_flops(gpu: str | None) -> float | None:
    """Of a known card, a second; None for others."""
    return next((peak * 1e12 for part, peak in PEAKS.items() if gpu and part in gpu), None)
