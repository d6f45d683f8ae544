"""Filling the caches of a training run without training: latents, and text encoder outputs."""

from dataclasses import replace

from library.caching_preflight import CachingPreflight
from library.dataset.dataset import TrainingDataset
from library.families.base import ModelFamily
from library.options.caching import CachingOptions
from library.options.derived import rounds_text
from library.recipes.network import cache_latents_of, cache_text_of, load_family
from library.training.memory_errors import memory_for
from library.training.precision import build_accelerator

OF_UNET = dict(blocks_to_swap=None, fp8_base_unet=False, base_quantization=None)  # which has no part in this
OF_TEXT = dict(base_weights=None, fp8_base=False)


def fill_caches(options: CachingOptions, checked: CachingPreflight) -> None:
    """Write the files that are missing or of no use, as the options ask."""
    writes_text = options.cache_text_encoder_outputs_to_disk
    options = replace(options, **OF_UNET, **(dict(fp8_base=rounds_text(options)) if writes_text else OF_TEXT))
    accelerator = build_accelerator(options)
    with memory_for("loading the model", options):
        family: ModelFamily = load_family(options, checked.family, accelerator.device)
    datasets = [TrainingDataset(scanned, options, options.seed or 0, 1) for scanned in checked.datasets]
    with memory_for("caching latents", options):
        cache_latents_of(datasets, family, options, accelerator)
    if writes_text:
        with memory_for("encoding captions", options):
            cache_text_of(datasets, family, options, accelerator)
    accelerator.end_training()
