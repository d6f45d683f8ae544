"""What can be told of the numbers in an adapter file: how much each layer changes, and what is broken or empty."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from library.adapters.file import AdapterFile, AdapterLayer
from library.adapters.low_rank import plain_factors
from library.adapters.names import kohya_name

BLOCKS = re.compile(r"_unet_((?:down|up|input|output)_blocks_\d+|mid_block|middle_block)_")
TEXT_ENCODER = re.compile(r"lora_(te\d?)_")


@dataclass(frozen=True)
class TensorFacts:
    key: str
    shape: tuple[int, ...]
    mean: float  # of the absolute values, as are
    smallest: float
    largest: float


@dataclass(frozen=True)
class LayerFacts:
    """One layer; its norm is the Frobenius norm of its change, None where that depends on the model's weight."""

    name: str
    label: str
    rank: int | None
    alpha: float | None
    norm: float | None
    is_empty: bool
    is_broken: bool

    @property
    def group(self) -> str:
        """The part of the model that it is in: a text encoder, or a block of the U-Net."""
        name = kohya_name(self.name)
        if match := TEXT_ENCODER.match(name):
            return {"te": "text encoder", "te1": "text encoder 1", "te2": "text encoder 2"}.get(match[1], match[1])
        block = BLOCKS.search(name)
        return f"U-Net {block[1]}" if block else "U-Net, other layers"


def facts_of(file: AdapterFile) -> Iterator[LayerFacts]:
    for layer in file.layers.values():
        tensors = {part: layer.tensor(part) for part in layer.found.keys}
        is_broken = any(not value.isfinite().all() for value in tensors.values() if value.is_floating_point())
        norm = None if is_broken else _norm(layer)
        is_empty = not is_broken and (norm == 0 if norm is not None else _is_zero(tensors))
        yield LayerFacts(layer.name, layer.label, layer.rank, layer.alpha, norm, is_empty, is_broken)


def _norm(layer: AdapterLayer) -> float | None:
    if layer.needs_weight:
        return None
    factors = plain_factors(layer)
    if factors is None:
        return layer.delta().norm().item()
    up, down = factors.up.double(), factors.down.double()  # |BA|^2 = tr(B^T B A A^T), which is as small as the rank
    return ((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt().item()


def _is_zero(tensors: dict[str, Tensor]) -> bool:
    """Whether the tensor that begins at zero is zero still, where the norm cannot be told."""
    names = ("up", "hada_w2_b", "oft_blocks", "diff_b", "weight", "b1", "a1", "lokr_w2", "lokr_w2_b")
    first = next((tensors[name] for name in names if name in tensors), None)
    return first is not None and not first.any().item() and "dora_scale" not in tensors


def tensor_facts(key: str, value: Tensor) -> TensorFacts:
    sizes = torch.nan_to_num(value.float().abs(), nan=float("inf"))
    return TensorFacts(key, tuple(value.shape), sizes.mean().item(), sizes.min().item(), sizes.max().item())
