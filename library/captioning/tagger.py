"""Taggers of the WD14 kind: an ONNX model that gives each of thousands of tags a probability. Needs no torch."""

import logging
from pathlib import Path
from typing import Any

import numpy as np

from library.captioning.tags import TagTable, read_tag_table
from library.dataset.images import load_image, resize
from library.errors import UserError, first_line

logger = logging.getLogger(__name__)

MODEL, TABLE = "model.onnx", "selected_tags.csv"
DIRECTML, ROCM, CUDA = "DmlExecutionProvider", "ROCMExecutionProvider", "CUDAExecutionProvider"
CPU = "CPUExecutionProvider"


class Tagger:
    """A model of a folder and its tags; UserError where the folder holds none."""

    def __init__(self, folder: Path):
        self.path = folder / MODEL
        self.table: TagTable = read_tag_table(folder / TABLE)
        self.session = _session(self.path)
        (taken,) = self.session.get_inputs()[:1]
        shape = taken.shape
        self._name = taken.name
        if len(shape) != 4 or shape[3] != 3 or not isinstance(shape[1], int) or shape[1] != shape[2]:
            raise UserError(f"{self.path} takes {shape}; a tagger takes pictures as [N, side, side, 3]")
        self.side: int = shape[1]  # pixels
        self.largest_batch = shape[0] if isinstance(shape[0], int) else None
        given = self.session.get_outputs()[0].shape[-1]
        if isinstance(given, int) and given != len(self.table.names):
            raise UserError(f"{self.path} knows {given} tags, {folder / TABLE} names {len(self.table.names)}")

    @property
    def provider(self) -> str:
        """What the model runs on, in onnxruntime's words."""
        return self.session.get_providers()[0]

    def read(self, picture: Path) -> tuple[np.ndarray, tuple[int, int]]:
        """A picture as the model takes it, and its width and height."""
        image = load_image(picture)
        return model_input(image, self.side), (image.shape[1], image.shape[0])

    def probabilities(self, inputs: list[np.ndarray]) -> np.ndarray:
        """Of every tag for each of the pictures, [B, N]."""
        (result,) = self.session.run(None, {self._name: np.stack(inputs)})[:1]
        if result.shape[-1] != len(self.table.names):
            raise UserError(f"{self.path} knows {result.shape[-1]} tags, {TABLE} names {len(self.table.names)}")
        return result


def model_input(image: np.ndarray, side: int) -> np.ndarray:
    """An RGB picture [H, W, 3] as [side, side, 3] float32 BGR from 0 to 255, on a white square."""
    height, width = image.shape[:2]
    edge = max(height, width)
    square = np.full((edge, edge, 3), 255, dtype=np.uint8)
    top, left = (edge - height) // 2, (edge - width) // 2
    square[top : top + height, left : left + width] = image
    return np.ascontiguousarray(resize(square, (side, side))[..., ::-1], dtype=np.float32)


def model_folder(model_dir: str, repo_id: str) -> Path:
    """The folder of the model: the one given, or the one in it that is named after the repository, as kohya's are."""
    given = Path(model_dir)
    inner = given / repo_id.replace("/", "_")
    return inner if not (given / MODEL).is_file() and inner.is_dir() else given


def model_problems(model_dir: str, repo_id: str) -> list[str]:
    """A sentence for each file of the model that is missing."""
    folder = model_folder(model_dir, repo_id)
    missing = [name for name in (MODEL, TABLE) if not (folder / name).is_file()]
    if not missing:
        return []
    return [
        f"--model_dir: {folder} has no {' and no '.join(missing)}; nothing is downloaded here: put both files of a "
        f"tagger such as {repo_id} there"
    ]


def _session(path: Path) -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise UserError("tagging needs the package onnxruntime: pip install -r requirements-tagger.txt") from None
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3  # errors
    available = onnxruntime.get_available_providers()
    wanted = [provider for provider in (CUDA, ROCM, DIRECTML, CPU) if provider in available]
    try:
        return onnxruntime.InferenceSession(str(path), settings, providers=wanted)
    except Exception as error:  # onnxruntime's own, of a damaged or unknown file
        raise UserError(f"{path} cannot be opened as an ONNX model: {first_line(error)}") from error
