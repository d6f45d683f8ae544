"""A LoRA out of the difference of two models, or out of an adapter file of another kind and its base model."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from library.adapters.base_model import BaseModel, open_base_model
from library.adapters.combining import PlainLora, exact_factors, is_small, layers_together, sum_of_vectors, whole_change
from library.adapters.devices import mover
from library.adapters.file import open_adapter
from library.adapters.low_rank import Factors, Spectrum, spectrum_of, spectrum_of_factors
from library.adapters.merge_jobs import require_known, tell_error
from library.adapters.merging import Weighted
from library.adapters.writing import VERSIONS, modelspec, short_metadata, write_lora
from library.errors import UserError, counted, quoted_list
from library.families.checkpoints import LAYOUTS
from library.families.detect import inspect_checkpoint

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Extraction:
    """How a LoRA is extracted."""

    dim: int
    conv_dim: int | None = None
    device: str | None = None
    clamp_quantile: float | None = None  # no factor is clamped without it
    min_diff: float = 0.01  # of a text encoder's weights; below, it counts as unchanged
    predicts_v: bool | None = None  # for the metadata; None stands for what is usual: SD 2.x does
    with_modelspec: bool = True

    def rank_of(self, inside: tuple[int, ...]) -> int | None:
        """The rank of a weight with these sizes behind the first; None where it is left alone."""
        return self.dim if all(side == 1 for side in inside[1:]) else self.conv_dim


def extract(original_path: str, tuned_path: str, target: Path, precision: str | None, how: Extraction) -> None:
    """Write the LoRA of these ranks that is closest to what was trained."""
    original = open_base_model(original_path, "--model_org")
    is_model = Path(tuned_path).is_dir() or inspect_checkpoint(tuned_path, "--model_tuned").kind in LAYOUTS
    lora = PlainLora()
    spectra = _of_models(original, tuned_path, how) if is_model else _of_adapter(original, Path(tuned_path), how, lora)
    for name, spectrum in spectra:
        lora.add_cut(name, spectrum, how.rank_of(spectrum.inside))
        if how.clamp_quantile is not None:
            clamp(lora, name, how.clamp_quantile)
    if how.clamp_quantile is not None:
        logger.warning("--clamp_quantile: factors are cut off, which adds to the error that is told")
    if not lora.weights:
        raise UserError(f"--model_tuned: {tuned_path} changes nothing that a LoRA has with these flags")
    tell_error(lora)
    predicts_v = original.kind == "sd2" if how.predicts_v is None else how.predicts_v
    version = VERSIONS[original.kind] + ("_v" if predicts_v and original.kind != "sdxl" else "")
    conv = {"conv_dim": str(how.conv_dim), "conv_alpha": str(float(how.conv_dim))} if how.conv_dim else {}
    metadata = short_metadata(version, lora, conv) | {
        "ss_network_dim": str(how.dim),
        "ss_network_alpha": str(float(how.dim)),
    }
    if how.with_modelspec:
        metadata |= modelspec(version, target, [Path(original_path), Path(tuned_path)], is_lora=True)
        if predicts_v:
            metadata["modelspec.prediction_type"] = "v"
    write_lora(target, lora, precision, metadata)
    logger.info("wrote %s: %s", target, counted(len(lora.ranks), "layer"))


def _of_models(original: BaseModel, tuned_path: str, how: Extraction) -> Iterator[tuple[str, Spectrum]]:
    """What differs between the models, layer by layer."""
    tuned = open_base_model(tuned_path, "--model_tuned")
    if tuned.kind != original.kind:
        raise UserError(
            f"--model_tuned: {tuned.path} is another kind of model than {original.path}: {tuned.kind}, {original.kind}"
        )
    to_device = mover(how.device)
    names = [target.name for target in original.targets(conv=how.conv_dim is not None)]
    names = [name for name in names if how.rank_of(original.layers[name].weight.shape[1:])]
    texts = [name for name in names if not name.startswith("lora_unet_")]
    if not any(_difference(original, tuned, name).abs().max() > how.min_diff for name in texts):
        logger.info(
            "no weight of the text encoders differs by more than %s (--min_diff): they are left out", how.min_diff
        )
        names = [name for name in names if name not in set(texts)]
    for name in tqdm(names, desc="extracting", unit="layers", delay=1):
        yield name, spectrum_of(to_device(_difference(original, tuned, name)))


def _difference(original: BaseModel, tuned: BaseModel, name: str) -> Tensor:
    one, other = original.layers[name].weight, tuned.layers[name].weight
    return tuned.read(other).reshape(one.shape) - original.read(one)


def _of_adapter(original: BaseModel, path: Path, how: Extraction, lora: PlainLora) -> Iterator[tuple[str, Spectrum]]:
    """What an adapter file does to the model, layer by layer; changes of norms and biases go straight into the LoRA."""
    file = open_adapter(path, "--model_tuned")
    adapters = [Weighted(file)]
    require_known(adapters)
    to_device, left_out = mover(how.device), []
    for name, parts in tqdm(layers_together(adapters).items(), desc="extracting", unit="layers", delay=1):
        lora.weights |= sum_of_vectors(name, parts)
        if is_small(parts):
            continue
        places = original.find(name)
        if places is None:
            raise UserError(f"--model_tuned: {path} was made for another model than {original.path}: it has no {name}")
        if how.rank_of(places.weight.shape[1:]) is None:
            left_out.append(name)
            continue
        factors = exact_factors(name, parts)
        if factors is None:
            yield name, spectrum_of(to_device(whole_change(name, parts, original)))
        else:
            moved = Factors(to_device(factors.up), to_device(factors.down), factors.inside)
            yield name, spectrum_of_factors(moved)
    if left_out:
        logger.warning(
            "%s convolutions are left out, as --conv_dim is not given: %s", len(left_out), quoted_list(left_out, 3)
        )


def clamp(lora: PlainLora, name: str, quantile: float) -> None:
    """Cut the factors of a layer off at this quantile of their sizes."""
    up, down = f"{name}.lora_up.weight", f"{name}.lora_down.weight"
    sizes = torch.cat([lora.weights[up].flatten(), lora.weights[down].flatten()]).abs().sort().values
    limit = float(sizes[min(len(sizes) - 1, int(quantile * len(sizes)))])
    for key in (up, down):
        lora.weights[key] = lora.weights[key].clamp(-limit, limit)
