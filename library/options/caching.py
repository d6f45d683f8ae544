"""The flags of the scripts that fill the caches of latents and text encoder outputs: training's, and a few more."""

from dataclasses import dataclass

from library.options.fields import OptionGroup, flags_of, option
from library.options.groups import (
    DenoisingOptions,
    DistributedOptions,
    LoopOptions,
    NetworkOptions,
    OptimizerOptions,
    SamplingOptions,
    SavingOptions,
    SchedulerOptions,
    TrainNetworkOptions,
)
from library.options.places import COMMAND_LINE

# Groups of options that are for training itself, and those of them that count here too.
OF_TRAINING = (
    *(NetworkOptions, OptimizerOptions, SchedulerOptions, LoopOptions, DenoisingOptions),
    *(SamplingOptions, SavingOptions, DistributedOptions),
)
USED_HERE = ("base_weights", "base_weights_multiplier", "seed", "ddp_timeout")
WEIGHTINGS = ("sigma_sqrt", "logit_normal", "mode", "cosmap", "none", "uniform")
TIMESTEPS = ("sigma", "uniform", "sigmoid", "shift", "flux_shift")


@dataclass(frozen=True, kw_only=True)
class OtherModelsOptions(OptionGroup):
    """Options of kohya's scripts for other models; none has an effect"""

    weighting_scheme: str = option("uniform", "of SD 3 and FLUX", choices=WEIGHTINGS)
    logit_mean: float = option(0.0, "of SD 3 and FLUX")
    logit_std: float = option(1.0, "of SD 3 and FLUX")
    mode_scale: float = option(1.29, "of SD 3 and FLUX")
    clip_l: str | None = option(None, "of SD 3 and FLUX", flag_type="path")
    t5xxl: str | None = option(None, "of SD 3 and FLUX", flag_type="path")
    t5xxl_dtype: str | None = option(None, "of SD 3 and FLUX")
    t5xxl_max_token_length: int | None = option(None, "of SD 3 and FLUX")
    apply_t5_attn_mask: bool = option(False, "of SD 3 and FLUX")
    ae: str | None = option(None, "of FLUX", flag_type="path")
    controlnet_model_name_or_path: str | None = option(None, "of FLUX", flag_type="path")
    guidance_scale: float = option(3.5, "of FLUX")
    timestep_sampling: str = option("sigma", "of FLUX", choices=TIMESTEPS)
    sigmoid_scale: float = option(1.0, "of FLUX")
    model_prediction_type: str = option("sigma_scaled", "of FLUX", choices=("raw", "additive", "sigma_scaled"))
    discrete_flow_shift: float = option(3.0, "of SD 3 and FLUX")
    model_type: str = option("flux", "of FLUX", choices=("flux", "chroma"))


@dataclass(frozen=True, kw_only=True)
class CachingOptions(TrainNetworkOptions, OtherModelsOptions):
    """Fill the caches that a training run reads, and stop."""

    sdxl: bool = option(False, "the base model is Stable Diffusion XL, which is seen without being told")
    flux: bool = option(False, "the base model is FLUX, which is not supported")
    skip_existing: bool = option(False, "take the files that are there without reading them, as --skip_cache_check")
    text_encoder_batch_size: int | None = option(None, "taken for kohya's sake: captions are encoded one by one")

    def check(self) -> list[str]:
        problems = ["--flux is not supported: this suite trains Stable Diffusion 1.x, 2.x and XL"] if self.flux else []
        for name in ("dry_run", "debug_dataset"):
            if getattr(self, name):
                problems.append(f"--{name} is for the training script, with the same options")
        return problems

    def _check_output_dir(self) -> list[str]:
        return []  # nothing is written there

    def _check_something_trains(self) -> list[str]:
        return []

    def _check_text_cache(self) -> list[str]:
        return []  # that text encoders stay as they are is for the training run to say


def warnings_for_caching(options: CachingOptions) -> list[str]:
    """A sentence for each option that is set and of no use to any model here."""
    flags = flags_of(CachingOptions)
    others = [name for name, flag in flags.items() if flag.group is OtherModelsOptions]
    given = [name for name in others if getattr(options, name) != flags[name].default]
    warnings = [f"--{name} has no effect: it is for models that this suite does not train" for name in given]
    if options.text_encoder_batch_size:
        warnings.append("--text_encoder_batch_size has no effect: captions are encoded one by one")
    of_training = [
        f"--{name}"
        for name, flag in flags.items()
        if flag.group in OF_TRAINING and name not in USED_HERE and options.sources.get(name) == COMMAND_LINE
    ]
    return warnings + ([f"without effect, as nothing is trained here: {', '.join(of_training)}"] if of_training else [])
