"""What a run is made of, for its record: versions, device, and fingerprints of model and pictures."""

import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from library.dataset.file_marks import FileMark
from library.dataset.scan import ScannedDataset
from library.training.metadata import IMPLEMENTATION_VERSION

try:
    import resource
except ImportError:  # on Windows
    resource = None

ROOT = Path(__file__).parents[2]
PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "safetensors",
    "numpy",
    "opencv-python-headless",
    "pillow",
)


def versions(*class_paths: str) -> dict[str, str | None]:
    """Versions of all that computes, the packages of the optimizer and the network included; None for unknown ones."""
    more = {path.partition(".")[0] for path in class_paths} - {"torch", "networks", *PACKAGES}
    pip_names = importlib.metadata.packages_distributions() if more else {}
    names = [*PACKAGES, *(pip_names.get(name, [name])[0] for name in sorted(more))]
    return {
        "athanor": IMPLEMENTATION_VERSION,
        "revision": _revision(),
        "python": platform.python_version(),
        "system": platform.platform(),
        **{name: _version(name) for name in names},
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _revision() -> str | None:
    """The commit of this checkout, "-dirty" where files differ from it; None where it is no checkout."""
    if not (ROOT / ".git").exists():
        return None
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None


def device_name(device: torch.device) -> str:
    """The GPU, or the kind of device and processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {platform.processor() or platform.machine()}"


def most_memory(device: torch.device) -> dict[str, int]:
    """The most bytes that were in use at once, as far as the system tells."""
    found = {"GPU memory": torch.cuda.max_memory_allocated(device)} if device.type == "cuda" else {}
    if resource is not None:
        unit = 1 if sys.platform == "darwin" else 1024
        found["main memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return found


def model_fingerprints(hashes: dict[str, object], base: Path) -> dict[str, object]:
    """The sha256 of the model and of a separate VAE, as metadata has them; of a folder, marks of its files."""
    found = {kind: hashes.get(f"ss_new_{key}_hash") for kind, key in (("base_model", "sd_model"), ("vae", "vae"))}
    if base.is_dir():
        paths = sorted(path for path in base.rglob("*") if path.is_file())
        found["base_model"] = digest((path.relative_to(base).as_posix(), FileMark.of(path).ends) for path in paths)
    return {kind: value for kind, value in found.items() if value}


def dataset_facts(scanned: dict[str, ScannedDataset], repeats: list[int]) -> dict[str, object]:
    """How many pictures there are, and a fingerprint: names, sizes in pixels and bytes, captions and repeats, in order.

    It is the same for a copy of the pictures, and reads none of them. A dataset class of the user's has none.
    """
    rows = [
        (use, record.subset, record.path.name, record.size_wh, _num_bytes(record.path), record.caption)
        for use, part in scanned.items()
        for record in part.records
    ]
    counts = {use: len(part.records) for use, part in scanned.items()}
    return {"num_pictures": counts, "fingerprint": digest([*rows, tuple(repeats)]) if rows else None}


def _num_bytes(path: Path) -> int:
    """The size of a file; 0 for a picture of which only the latents are left."""
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def digest(rows: Iterable[tuple[Any, ...]]) -> str:
    """A hash of rows of texts and numbers."""
    found = hashlib.blake2b(digest_size=16)
    for row in rows:
        found.update(repr(row).encode("utf-8", "surrogatepass"))
    return found.hexdigest()
