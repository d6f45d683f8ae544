"""Filling the caches of a training run without training: latents, and text encoder outputs."""

from library.caching_preflight import CachingPreflight
from library.dataset.dataset import TrainingDataset
from library.families.base import ModelFamily
from library.options.caching import CachingOptions
from library.recipes.network import cache_latents_of, cache_text_of, load_family
from library.training.memory_errors import memory_for
from library.training.precision import build_accelerator


def fill_caches(options: CachingOptions, checked: CachingPreflight) -> None:
    """Write the files that are missing or of no use, as the options ask."""
    accelerator = build_accelerator(options)
    with memory_for("loading the model", options):
        family: ModelFamily = load_family(options, checked.family, accelerator.device)
    datasets = [TrainingDataset(scanned, options, options.seed or 0, 1) for scanned in checked.datasets]
    with memory_for("caching latents", options):
        cache_latents_of(datasets, family, options, accelerator)
    if options.cache_text_encoder_outputs_to_disk:
        with memory_for("encoding captions", options):
            cache_text_of(datasets, family, options, accelerator)
    accelerator.end_training()
