"""Layers of one or several adapter files as one plain LoRA."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from library.adapters.base_model import BaseModel
from library.adapters.file import AdapterLayer
from library.adapters.low_rank import (
    Factors,
    Spectrum,
    plain_factors,
    put_side_by_side,
    spectrum_of,
    spectrum_of_factors,
)
from library.adapters.merging import Weighted
from library.adapters.names import kernel_of, kohya_name
from library.errors import UserError

Part = tuple[AdapterLayer, float]  # a layer of a file, and how much of it is wanted


@dataclass
class PlainLora:
    """What is written: the tensors of a LoRA, and how near it is to what was asked for."""

    weights: dict[str, Tensor] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)  # by layer
    alphas: dict[str, float] = field(default_factory=dict)
    lost: float = 0.0  # squares of Frobenius norms, summed over the layers
    total: float = 0.0

    def add(self, name: str, factors: Factors, alpha: float | None = None) -> None:
        tensors = factors.tensors(name, alpha)
        self.weights |= tensors
        self.ranks[name] = factors.rank
        self.alphas[name] = float(tensors[f"{name}.alpha"])

    def add_cut(self, name: str, spectrum: Spectrum, rank: int, alpha_per_rank: float = 1.0) -> None:
        """The part of a change that this rank holds."""
        factors = spectrum.cut(rank)
        self.add(name, factors, alpha_per_rank * factors.rank)
        lost, total = spectrum.error(factors.rank)
        self.lost, self.total = self.lost + lost, self.total + total

    @property
    def error(self) -> float:
        """The relative error of all changes together, which is the least that these ranks allow."""
        return (self.lost / self.total) ** 0.5 if self.total else 0.0


def layers_together(adapters: Iterable[Weighted]) -> dict[str, list[Part]]:
    """The layers of all files by kohya's name, in the order of the files."""
    found: dict[str, list[Part]] = {}
    for adapter in adapters:
        for name, layer in adapter.file.layers.items():
            found.setdefault(kohya_name(name), []).append((layer, adapter.ratio_of(name)))
    return found


def is_small(parts: Sequence[Part]) -> bool:
    """Whether what changes is a vector: a norm, or a bias alone."""
    return all(layer.algorithm in ("norm", "bias") or changes_vector(layer) for layer, _ in parts)


def changes_vector(layer: AdapterLayer) -> bool:
    """Whether a full change is that of a norm's weight."""
    return layer.algorithm == "full" and len(layer.shape("diff")) == 1


def sum_of_vectors(name: str, parts: Sequence[Part]) -> dict[str, Tensor]:
    """The changes of norms and biases, under their own names: LoRA has none for them."""
    sums: dict[str, Tensor] = {}
    for layer, ratio in parts:
        for part in ("w_norm", "b_norm", "diff_b", *(["diff"] if changes_vector(layer) else [])):
            if part in layer.found.keys:
                change = ratio * layer.tensor(part).float()
                key = f"{name}.{part}"
                sums[key] = sums[key] + change if key in sums else change
    return sums


def exact_factors(name: str, parts: Sequence[Part]) -> Factors | None:
    """The sum of the changes as factors; None where one of the files is no plain LoRA there."""
    factors = [plain_factors(layer, ratio) for layer, ratio in parts]
    if None in factors:
        return None
    require_one_size(name, [(len(factor.up), factor.down.shape[1]) for factor in factors])
    return put_side_by_side(factors)


def require_one_size(name: str, sizes: Sequence[tuple[int, ...]]) -> None:
    """UserError where files change a layer of other sizes under the same name."""
    if len(found := sorted(set(sizes))) > 1:
        raise UserError(f"--models: {name} has sizes {found[0]} and {found[1]}: the files are for different models")


def spectrum_of_parts(
    name: str, parts: Sequence[Part], model: BaseModel | None, to_device: Callable[[Tensor], Tensor]
) -> Spectrum:
    """The decomposition of the sum of the changes of a layer; UserError where that needs a model that is not given."""
    factors = exact_factors(name, parts)
    if factors is not None:
        return spectrum_of_factors(Factors(to_device(factors.up), to_device(factors.down), factors.inside))
    return spectrum_of(to_device(whole_change(name, parts, model)))


def whole_change(name: str, parts: Sequence[Part], model: BaseModel | None) -> Tensor:
    """The sum of the changes of a layer [out, in, kernel]; each file's change is of the model's own weight."""
    places = model.find(name) if model else None
    weight = model.read(places.weight) if places else None
    if model and places is None:
        raise UserError(f"{name}: {model.path} has no such layer; give the model that the files were trained on")
    changes = [ratio * layer.delta(weight) for layer, ratio in parts]
    if weight is None:
        changes = [change.reshape(len(change), -1, *kernel_of(name)) for change in changes]
        changes = [change if kernel_of(name) else change.flatten(1) for change in changes]
    require_one_size(name, [tuple(change.shape) for change in changes])
    return torch.stack(changes).sum(0)
