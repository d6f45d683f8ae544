"""What an adapter file of any kind does, as a plain LoRA that every program applies."""

import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from library.adapters.base_model import BaseModel, open_base_model
from library.adapters.combining import spectrum_of_parts
from library.adapters.file import AdapterFile, AdapterLayer, open_adapter
from library.adapters.low_rank import Factors, plain_factors, rank_by_norm
from library.adapters.spellings import kohya_names
from library.adapters.writing import VERSIONS, one_or_dynamic
from library.errors import UserError, counted, quoted_list
from library.network_files import write_weights

logger = logging.getLogger(__name__)

KEPT = (1 - 1e-10) ** 0.5  # of the Frobenius norm, by a rank that counts as exact: float32 finds no more
VECTORS = "diff_b", "w_norm", "b_norm"  # which LoRA has no place for


@dataclass
class Baked:
    """A LoRA as it is made, and how near it is to what the file does.

    All layers have one alpha, as diffusers does not find that of each layer in every text encoder.
    """

    alpha: float
    weights: dict[str, Tensor] = field(default_factory=dict)
    ranks: list[int] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)  # relative, by layer
    lost: float = 0.0  # squares of Frobenius norms, summed over the layers
    total: float = 0.0
    left_out: list[str] = field(default_factory=list)

    def add(self, name: str, factors: Factors, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Add a layer; what is written of its factors, [out, r] and [r, in * kernel]."""
        tensors = {key: value.to(dtype) for key, value in factors.tensors(name, self.alpha).items()}
        self.weights |= tensors
        self.ranks.append(factors.rank)
        up, down = (tensors[f"{name}.lora_{end}.weight"].flatten(1).float() for end in ("up", "down"))
        return self.alpha / factors.rank * up, down


def bake(path: Path, target: Path, rank: int, model_path: str | None, kind: str) -> Baked:
    """Write the LoRA of at most this rank in each layer that is closest to what the file does.

    Layers that are LoRA already keep their rank. UserError where a layer of the file is none of the model's.
    """
    file = open_adapter(path, "files")
    model = open_base_model(model_path, "--model") if model_path else None
    names = kohya_names(kind)
    unknown = [name for name in file.layers if name not in names]
    if unknown:
        raise UserError(f"files: {path} has layers that its model has not: {quoted_list(unknown, 3)}")
    baked = Baked(alpha=float(rank), left_out=list(file.leftovers))
    for name, layer in tqdm(file.layers.items(), desc="baking", unit="layers", delay=1):
        _add(baked, names[name], layer, rank, model)
    if not baked.weights:
        raise UserError(f"files: {path} changes nothing that a LoRA can change")
    write_weights(target, baked.weights, None, _metadata(file, baked, kind))
    _tell(baked, target)
    return baked


@torch.no_grad()
def _add(baked: Baked, name: str, layer: AdapterLayer, rank: int, model: BaseModel | None) -> None:
    """Add a layer under its name of kohya's."""
    baked.left_out += [f"{name}.{part}" for part in VECTORS if part in layer.found.keys]
    if layer.algorithm in ("norm", "bias"):
        return
    dtype = _dtype(layer)
    if layer.algorithm == "lora" and not layer.is_dora and "mid" not in layer.found.keys and layer.rank <= rank:
        baked.add(name, plain_factors(layer), dtype)
        return
    spectrum = spectrum_of_parts(name, [(layer, 1.0)], model, lambda tensor: tensor)
    if not spectrum.values[0]:
        return
    up, down = baked.add(name, spectrum.cut(min(rank, rank_by_norm(spectrum.values, KEPT))), dtype)
    whole = (spectrum.left * spectrum.values) @ spectrum.right
    lost, total = ((whole - up @ down).double().square().sum().item(), whole.double().square().sum().item())
    baked.errors[name] = (lost / total) ** 0.5
    baked.lost, baked.total = baked.lost + lost, baked.total + total


def _dtype(layer: AdapterLayer) -> torch.dtype:
    """The number format of most of a layer's weights."""
    key = max(layer.found.keys, key=lambda part: layer.tensor(part).numel())
    return layer.tensor(key).dtype


def _metadata(file: AdapterFile, baked: Baked, kind: str) -> dict[str, str]:
    """The file's, with what became of the network."""
    fields = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": one_or_dynamic(baked.ranks),
        "ss_network_alpha": str(baked.alpha),
    }
    old = {name: value for name, value in file.metadata.items() if name != "ss_network_args"}
    defaults = {"ss_base_model_version": VERSIONS[kind], "ss_v2": str(kind == "sd2")}
    return defaults | old | fields


def _tell(baked: Baked, target: Path) -> None:
    ranks = f"{min(baked.ranks)} to {max(baked.ranks)}"
    logger.info("wrote %s: %s, ranks %s", target, counted(len(baked.ranks), "layer"), ranks)
    if baked.errors:
        worst = max(baked.errors, key=baked.errors.get)
        error = (baked.lost / baked.total) ** 0.5
        logger.info(
            "relative error of what was baked: %.2g in all, at most %.2g (%s)", error, baked.errors[worst], worst
        )
    if baked.left_out:
        left_out = quoted_list(baked.left_out, 2)
        logger.warning(
            "left out, as a LoRA has no place for them: %s, e.g. %s", counted(len(baked.left_out), "tensor"), left_out
        )
