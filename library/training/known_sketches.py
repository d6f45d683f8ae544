"""What frozen models make of their test inputs, remembered, so that a model that is the same as ever is not loaded."""

import hashlib
from base64 import b64decode, b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from library.families.parts import Part
from library.user_cache import remember, remembered

TABLE = "sketches.json"


@dataclass(frozen=True)
class Sketch:
    """By what a model is known: some of what it makes of a test input, and the shapes of its outputs by their names."""

    values: np.ndarray  # [D], float32
    shapes: dict[str, tuple[int, ...]]


def known_sketch(what: str, parts: Sequence[Part], dtype: torch.dtype, make: Callable[[], Sketch]) -> Sketch:
    """What `make` returns, who asks the parts; of the same files it is what it returned last time, and it is not asked.

    `what` says all else that it depends on. Nothing is remembered of parts whose numbers are not those of a file alone.
    """
    files = [part.file for part in parts]
    if None in files:
        return make()
    key = " ".join([what, str(dtype).removeprefix("torch."), *(file.path for file in files)])
    marks = [[*file.marks(), settings_mark(part)] for file, part in zip(files, parts, strict=True)]
    if sketch := read(remembered(TABLE).get(key), marks):
        return sketch
    sketch = make()
    is_same = [file.marks() for file in files] == [of_file[:-1] for of_file in marks]
    if is_same and np.isfinite(sketch.values).all():
        values = b64encode(sketch.values.astype("<f4").tobytes()).decode()
        remember(TABLE, key, {"files": marks, "values": values, "shapes": sketch.shapes})
    return sketch


def read(entry: Any, marks: list[list[int | str]]) -> Sketch | None:
    """The sketch of an entry; None where there is none, or it is of other files."""
    match entry:
        case {"files": known, "values": str(values), "shapes": dict(shapes)} if known == marks:
            try:
                found = np.frombuffer(b64decode(values, validate=True), "<f4")
                return Sketch(found, {name: tuple(map(int, shape)) for name, shape in shapes.items()})
            except (ValueError, TypeError):  # damaged
                return None
    return None


def settings_mark(part: Part) -> str:
    """A hash of how the layers are built, which in folders stands in a file of its own."""
    config = part.layers.config
    settings = config.to_dict() if hasattr(config, "to_dict") else config
    texts = sorted(f"{name} {value}" for name, value in settings.items() if not name.startswith("_"))
    return hashlib.blake2b("\n".join(texts).encode(), digest_size=8).hexdigest()
