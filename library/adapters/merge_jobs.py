"""What the merging scripts do, from checked flags to the file."""

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from library.adapters.base_model import open_base_model
from library.adapters.block_weights import BlockWeights
from library.adapters.combining import (
    PlainLora,
    exact_factors,
    is_small,
    layers_together,
    spectrum_of_parts,
    sum_of_vectors,
)
from library.adapters.devices import mover
from library.adapters.file import open_adapter
from library.adapters.flags import MergeFlags, RankFlags
from library.adapters.low_rank import spectrum_of_factors
from library.adapters.merging import Weighted, plan_merge, write_merged
from library.adapters.writing import (
    DTYPES,
    VERSIONS,
    modelspec,
    short_metadata,
    version_of,
    write_lora,
)
from library.errors import UserError, counted, quoted_list

logger = logging.getLogger(__name__)


def open_all(given: Iterable[tuple[Path, float, BlockWeights | None]]) -> list[Weighted]:
    """The adapter files with their ratios."""
    return [Weighted(open_adapter(path, "--models"), ratio, blocks) for path, ratio, blocks in given]


def merge_into_model(options: MergeFlags, model_path: str, adapters: list[Weighted]) -> None:
    """Write the model with all files added to it, reading and writing one tensor after the other."""
    model = open_base_model(model_path, "--sd_model")
    plan = plan_merge(model, adapters)
    target = Path(options.save_to)
    sources = [Path(model_path), *(adapter.file.path for adapter in adapters)]
    metadata = None if options.no_metadata else modelspec(VERSIONS[model.kind], target, sources, is_lora=False)
    num_tensors = sum(len(weights) for weights in model.files.values())
    with tqdm(total=num_tensors, desc="merging", unit="tensors", delay=1) as bar:
        write_merged(model, plan, target, DTYPES[options.save_precision or options.precision], metadata, bar.update)
    num_changed = sum(len(changes) for changes in plan.values())
    logger.info("wrote %s: %s changed", target, counted(num_changed, "tensor"))


def warn_of_flags_for_loras(concat: bool, shuffle: bool) -> None:
    for name, given in (("concat", concat), ("shuffle", shuffle)):
        if given:
            logger.warning("--%s has no effect with --sd_model: it is for merging files into one LoRA", name)


def merge_into_lora(options: MergeFlags, adapters: list[Weighted], concat: bool, shuffle: bool) -> None:
    """Write one LoRA that does what all files do: exactly with `concat`, else as nearly as the largest rank allows."""
    require_known(adapters)
    together = layers_together(adapters)
    lora = PlainLora()
    for name, parts in tqdm(together.items(), desc="merging", unit="layers", delay=1):
        lora.weights |= sum_of_vectors(name, parts)
        if is_small(parts):
            continue
        factors = exact_factors(name, parts)
        if factors is None:
            layer = next(layer for layer, _ in parts if layer.algorithm != "lora" or layer.is_dora)
            raise UserError(
                f"--models: {name} is {layer.label}, which does not merge into a LoRA exactly; use svd_merge_lora.py"
            )
        if concat or len(parts) == 1:
            lora.add(name, factors)
        else:
            lora.add_cut(name, spectrum_of_factors(factors), max(layer.rank for layer, _ in parts))
    if shuffle:
        shuffle_ranks(lora)
    tell_error(lora)
    save(options, lora, adapters)


def merge_by_svd(options: MergeFlags, ranks: RankFlags, adapters: list[Weighted], model_path: str | None) -> None:
    """Write the LoRA of the wanted ranks that is closest to what all files do together."""
    require_known(adapters)
    model = open_base_model(model_path, "--sd_model") if model_path else None
    to_device, lora = mover(ranks.device), PlainLora()
    for name, parts in tqdm(layers_together(adapters).items(), desc="merging", unit="layers", delay=1):
        lora.weights |= sum_of_vectors(name, parts)
        if not is_small(parts):
            spectrum = spectrum_of_parts(name, parts, model, to_device)
            lora.add_cut(name, spectrum, ranks.rank_of(spectrum.inside))
    tell_error(lora)
    conv_rank = ranks.new_conv_rank or ranks.new_rank
    fields = {"ss_network_dim": str(ranks.new_rank), "ss_network_alpha": str(ranks.new_rank)}
    arguments = {"conv_dim": str(conv_rank), "conv_alpha": str(conv_rank)}
    save(options, lora, adapters, fields | {"ss_network_args": json.dumps(arguments)})


def require_known(adapters: Iterable[Weighted]) -> None:
    """A warning for keys that no algorithm here has, and that the merged file is therefore without."""
    for adapter in adapters:
        if adapter.file.leftovers:
            logger.warning(
                "%s: not merged, as nothing here knows them: %s",
                adapter.file.path,
                quoted_list(adapter.file.leftovers, 3),
            )


def shuffle_ranks(lora: PlainLora) -> None:
    for name, rank in lora.ranks.items():
        order = torch.randperm(rank)
        for end, axis in ((".lora_down.weight", 0), (".lora_up.weight", 1)):
            value: Tensor = lora.weights[name + end]
            lora.weights[name + end] = value.index_select(axis, order)


def tell_error(lora: PlainLora) -> None:
    """Say how far the ranks that were kept are from the exact sum."""
    if lora.total:
        logger.info("relative error of the change of all weights: %.4f, the least that these ranks allow", lora.error)


def save(
    options: MergeFlags, lora: PlainLora, adapters: list[Weighted], fields: Mapping[str, str] | None = None
) -> None:
    """Write the LoRA, with these fields of metadata in place of what its layers tell."""
    files, target = [adapter.file for adapter in adapters], Path(options.save_to)
    version = version_of(files)
    metadata = short_metadata(version, lora) | dict(fields or {})
    if not options.no_metadata:
        metadata |= modelspec(version, target, [file.path for file in files], is_lora=True)
    write_lora(target, lora, options.save_precision or options.precision, metadata)
    logger.info("wrote %s: %s", target, counted(len(lora.ranks), "layer"))
