"""An adapter file of any kind, opened: its layers by name, read when they are asked for."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from library.adapters.algorithms import ALGORITHMS, decomposed
from library.adapters.keys import LayerKeys, sort_keys
from library.errors import UserError
from library.families.checkpoint_files import SafetensorsReader
from library.network_files import read_weights
from library.safetensors_header import read_header

RANK_OF = {"lora": "down", "loha": "hada_w1_b", "glora": "a2"}  # whose first size it is; LoKr has it at one of two


@dataclass(frozen=True)
class AdapterLayer:
    """What a file does to one layer of a model."""

    found: LayerKeys
    weights: Mapping[str, Tensor]  # of the whole file

    @property
    def name(self) -> str:
        return self.found.name

    @property
    def algorithm(self) -> str:
        """A key of `library.adapters.keys.ALGORITHMS`."""
        return self.found.algorithm

    @property
    def is_dora(self) -> bool:
        return "dora_scale" in self.found.keys

    @property
    def needs_weight(self) -> bool:
        """Whether the change depends on the weight of the layer that it changes."""
        return ALGORITHMS[self.algorithm].needs_weight or self.is_dora

    @property
    def rank(self) -> int | None:
        """None where the algorithm has none."""
        part = RANK_OF.get(self.algorithm)
        if self.algorithm == "lokr":
            part = next((name for name in ("lokr_w2_b", "lokr_w1_b") if name in self.found.keys), None)
        return self.shape(part)[0] if part else None

    @property
    def alpha(self) -> float | None:
        """None where the file has none; it stands for the rank then."""
        return float(self.tensor("alpha").flatten()[0]) if "alpha" in self.found.keys else None

    def shape(self, part: str) -> tuple[int, ...]:
        key = self.found.keys[part]
        return self.weights.shape(key) if hasattr(self.weights, "shape") else tuple(self.weights[key].shape)

    def tensor(self, part: str) -> Tensor:
        """As it is in the file."""
        return self.weights[self.found.keys[part]]

    def tensors(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """All of the layer's, by what they are."""
        return {part: self.weights[key].to(dtype) for part, key in self.found.keys.items()}

    @torch.no_grad()
    def delta(self, weight: Tensor | None = None) -> Tensor:
        """The change of the layer's weight at multiplier 1, in float32, or in float64 where the weight is.

        It has the shape of the weight; without one, that which the tensors tell: [out, in, kernel], where LoHa and
        LoKr may have the kernel flattened into [out, in * kernel]. UserError where a weight is needed, or does not fit.
        """
        if self.needs_weight and weight is None:
            raise UserError(
                f"{self.name}: what {self.label} does depends on the model's own weight: give the model that it was "
                "trained on"
            )
        if weight is not None and weight.dtype != torch.float64:
            weight = weight.float()
        tensors = self.tensors(torch.float32 if weight is None else weight.dtype)
        try:
            change = ALGORITHMS[self.algorithm].delta(tensors, weight)
            if weight is None:
                return change
            change = change.reshape(weight.shape)
            return decomposed(change, tensors["dora_scale"], weight) if self.is_dora else change
        except RuntimeError as error:
            fits = f"the model's layer, which has {tuple(weight.shape)}" if weight is not None else "each other"
            raise UserError(f"{self.name}: the tensors of this {self.label} do not fit {fits}") from error

    @torch.no_grad()
    def bias_delta(self) -> Tensor | None:
        """The change of the layer's bias at multiplier 1; None where it stays."""
        part = next((name for name in ("diff_b", "b_norm") if name in self.found.keys), None)
        return self.tensor(part).float() if part else None

    @property
    def label(self) -> str:
        """How a sentence names what made the layer."""
        return LABELS[self.algorithm] + (" with DoRA" if self.is_dora else "")


LABELS = {
    "lora": "LoRA",
    "loha": "LoHa",
    "lokr": "LoKr",
    "oft": "OFT",
    "glora": "GLoRA",
    "ia3": "(IA)^3",
    "full": "full change",
    "bias": "change of bias",
    "norm": "change of norm",
}


@dataclass(frozen=True)
class AdapterFile:
    """The layers of a file, in its order."""

    path: Path
    layers: dict[str, AdapterLayer]  # by their names in the file
    leftovers: list[str]  # keys that no algorithm here has
    metadata: dict[str, str]
    weights: Mapping[str, Tensor]


def open_adapter(path: Path, flag: str) -> AdapterFile:
    """Open a file; of safetensors only the header is read. UserError, which begins with the flag, where it is none."""
    if not path.is_file():
        raise UserError(f"{flag}: there is no file {path}")
    if path.suffix.lower() == ".safetensors":
        metadata, weights = read_header(path, flag).metadata, SafetensorsReader(path, mapped=False)
    else:
        metadata, weights = {}, read_weights(path)
    found = sort_keys(weights)
    if not found.layers:
        raise UserError(f"{flag}: {path} has no layer of a LoRA or another adapter that is known here")
    layers = {name: AdapterLayer(keys, weights) for name, keys in found.layers.items()}
    return AdapterFile(path, layers, found.leftovers, metadata, weights)
