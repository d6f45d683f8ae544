"""What a run has left behind: weights and metadata of its file, curves in its logs."""

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(str(path), "pt") as file:
        return file.metadata()


def weights_equal(first: Path, second: Path) -> bool:
    """Whether two files hold the same names and the same bits."""
    a, b = load_file(first), load_file(second)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def curves(logging_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values of every scalar of the one run in a folder of logs."""
    (run,) = logging_dir.glob("*/network_train")
    events = EventAccumulator(str(run)).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def scalars(logging_dir: Path) -> dict[str, list[float]]:
    """The same without the steps."""
    return {tag: [value for _, value in curve] for tag, curve in curves(logging_dir).items()}
