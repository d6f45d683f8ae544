"""A LoRA of smaller ranks out of an adapter file."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from library.adapters.base_model import open_base_model
from library.adapters.combining import PlainLora, is_small, layers_together, spectrum_of_parts, sum_of_vectors
from library.adapters.devices import mover
from library.adapters.file import AdapterFile, AdapterLayer, open_adapter
from library.adapters.flags import RankFlags
from library.adapters.low_rank import chosen_rank
from library.adapters.merge_jobs import require_known, tell_error
from library.adapters.merging import Weighted
from library.adapters.writing import DYNAMIC, one_or_dynamic, write_lora
from library.errors import counted

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Resizing:
    """How ranks are chosen, and what it is computed with."""

    ranks: RankFlags
    method: str | None = None
    parameter: float | None = None
    model_path: str | None = None
    verbose: bool = False


def resize(path: Path, target: Path, precision: str | None, how: Resizing) -> None:
    """Write the LoRA closest to what the file does, with its metadata and what became of its ranks."""
    file = open_adapter(path, "--model")
    adapters = [Weighted(file)]
    require_known(adapters)
    model = open_base_model(how.model_path, "--sd_model") if how.model_path else None
    to_device, lora = mover(how.ranks.device), PlainLora()
    for name, parts in tqdm(
        layers_together(adapters).items(), desc="resizing", unit="layers", delay=1, disable=how.verbose
    ):
        lora.weights |= sum_of_vectors(name, parts)
        if is_small(parts):
            continue
        spectrum = spectrum_of_parts(name, parts, model, to_device)
        rank = chosen_rank(spectrum.values, how.ranks.rank_of(spectrum.inside), how.method, how.parameter)
        lora.add_cut(name, spectrum, rank, alpha_per_rank(parts[0][0]))
        if how.verbose:
            lost, total = spectrum.error(rank)
            share = (lost / total) ** 0.5 if total else 0.0
            logger.info("%s: rank %d of %d, relative error %.4f", name, rank, len(spectrum.values), share)
    tell_error(lora)
    write_lora(target, lora, precision, file.metadata | resized_metadata(file, lora, how))
    logger.info("wrote %s: %s, ranks %s", target, counted(len(lora.ranks), "layer"), span(lora.ranks.values()))


def alpha_per_rank(layer: AdapterLayer) -> float:
    """What alpha / rank was in the file, so that it stays; 1 for what had none that counts alike."""
    if layer.algorithm != "lora" or layer.is_dora or not layer.alpha:
        return 1.0
    return abs(layer.alpha) / layer.rank


def resized_metadata(file: AdapterFile, lora: PlainLora, how: Resizing) -> dict[str, str]:
    """The fields that change, under kohya's names."""
    before = span(layer.rank for layer in file.layers.values() if layer.rank)
    way = f"{how.method} {how.parameter}" if how.method else f"rank {span(lora.ranks.values())}"
    comment = f"resized from rank {before} with {way}"
    if old := file.metadata.get("ss_training_comment"):
        comment += f"; {old}"
    dim, alpha = str(how.ranks.new_rank), one_or_dynamic(lora.alphas.values())
    if how.method:
        dim = alpha = DYNAMIC
    fields = {"ss_network_dim": dim, "ss_network_alpha": alpha, "ss_network_module": "networks.lora"}
    return fields | {"ss_training_comment": comment}


def span(ranks: Iterable[int]) -> str:
    """The smallest and the largest of some numbers, for a sentence."""
    found = sorted(ranks)
    if not found:
        return "none"
    return str(found[0]) if found[0] == found[-1] else f"{found[0]} to {found[-1]}"
